"""The command that draws every figure."""

import json

import numpy as np
import pytest
from conftest import GOLDEN
from PIL import Image
from published import CASES, random_model, random_params, write_run
from whole_runs import quick_config

from vit_jax import models, pretrained
from vit_jax.figures import command

OF_MODELS = ("rollout", "heads", "distances", "filters", "positions", "features")


def written(out) -> set[str]:
    """The names of the figures in a folder, each of them a picture with something in it."""
    for path in out.iterdir():
        pixels = np.asarray(Image.open(path).convert("RGB"))
        assert min(pixels.shape[:2]) > 150
        assert pixels.std() > 5
    return {path.name for path in out.iterdir()}


def draw(capsys, *arguments) -> list[str]:
    """Runs the command, and returns the lines that it prints."""
    assert command.main(list(map(str, arguments))) == 0
    return capsys.readouterr().out.splitlines()


@pytest.fixture
def digits_run(tmp_path):
    """A run on the embedded digits whose model doesn't pool and has no positions."""
    config = quick_config(num_classes=10)
    config.model.update(pool="none", posemb="none")
    params = random_params(models.from_config(config), (16, 16), channels=1)
    workdir = write_run(tmp_path / "run", config, params=params)
    (workdir / "metrics.jsonl").write_text(json.dumps({"step": 60, "train/loss": 1.0}) + "\n")
    return workdir


@pytest.mark.slow
def test_run_on_digits(digits_run, tmp_path, capsys):
    lines = draw(capsys, digits_run, f"--out={tmp_path / 'new' / 'out'}", "--compare", digits_run)
    names = [name for name in (*OF_MODELS, "curves") if name != "positions"]
    assert written(tmp_path / "new" / "out") == {f"{name}.png" for name in names}
    assert len(lines) == 7
    refusal = "positions not drawn: model.posemb is 'none': the model has no position embeddings"
    assert [line for line in lines if not line.startswith(str(tmp_path))] == [
        f"{refusal} to compare"
    ]
    digits = command.default_images(digits_run)
    assert [name for name, _ in digits] == [f"digit {i}" for i in range(10)]
    assert digits[0][1].shape == (8, 8)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["google_hybrid", "bigvision_map_scan"])
def test_published_weights(name, tmp_path, capsys):
    path, num_heads = GOLDEN / CASES[name]["weights"], CASES[name]["num_heads"]
    lines = draw(capsys, path, f"--out={tmp_path}", f"--num_heads={num_heads}", "--layers", 2, 1)
    assert written(tmp_path) == {f"{name}.png" for name in OF_MODELS}
    assert [line.split(":")[0] for line in lines] == [str(tmp_path / f"{n}.png") for n in OF_MODELS]


@pytest.mark.slow
def test_weights_without_a_head_and_images_of_any_kind(tmp_path, capsys):
    model, params, _ = random_model(gelu="exact", num_classes=None)
    pretrained.save(params, tmp_path / "hf", "hf", model=model)
    (tmp_path / "images" / "sub").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, shape in (("sub/gray.png", (20, 50)), ("b.JPG", (70, 33, 3)), ("c.txt", (1, 1))):
        with open(tmp_path / "images" / name, "wb") as file:
            Image.fromarray(np.uint8(rng.integers(0, 256, shape))).save(file, "png")
    out = tmp_path / "out"
    for _ in range(2):  # the second time overwrites the first
        draw(capsys, tmp_path / "hf", "--out", out, "--images", tmp_path / "images")
    assert written(out) == {f"{name}.png" for name in OF_MODELS}
    images = command.read_images([str(tmp_path / "images")], None, channels=1)
    assert [(name, image.shape) for name, image in images] == [
        ("b.JPG", (70, 33, 1)),
        ("gray.png", (20, 50, 1)),
    ]


def test_mistakes_end_with_one_line(digits_run, tmp_path, capsys):
    no_image = tmp_path / "a.png"
    no_image.write_text("text")
    (tmp_path / "empty").mkdir()
    weights = GOLDEN / CASES["google_token"]["weights"]
    with_heads = (weights, "--num_heads=4")
    for arguments, message in (
        ((tmp_path / "nothing",), "There is no"),
        ((digits_run, "--images", tmp_path / "b.png"), "There is no"),
        ((digits_run, "--images", no_image), "can't be read as an image"),
        ((digits_run, "--images", tmp_path / "empty"), "has no images: expected"),
        ((digits_run, "--layers", 2), "a layer is 2; it must be a whole number >= 1 and <= 1"),
        ((*with_heads, "--compare", digits_run), "is not a run's folder"),
        ((*with_heads, "--image_size", 31, 32), "31 is not divisible by the patch size 8"),
    ):
        assert command.main([*map(str, arguments), f"--out={tmp_path / 'out'}"]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert command.main([str(digits_run), f"--out={no_image}"]) == 2
    assert "a.png is a file): give another folder, by --out" in capsys.readouterr().err
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / "heads.png").write_text("mine")
    assert command.main([str(digits_run), f"--out={tmp_path / 'out'}"]) == 2
    assert "heads.png', a file that this program didn't write" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["heads.png"]
