"""Images in, classes out: predict.py, with evaluate.py for comparison."""

import contextlib
import json
import shutil

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from conftest import tiny_model
from PIL import Image
from published import assert_same, random_model, random_params, write_run
from whole_runs import quick_config, run_script

import evaluate
import input_pipeline
import predict
import vit_jax
from vit_jax import checks, models, pretrained
from vit_jax.errors import UserError
from vit_jax.pretrained import weights
from vit_jax.runs import run_folder


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    """The folder of a run: a random model of digits, with an average of its parameters."""
    config = quick_config(num_classes=10, ema_decay=0.5)
    model = models.from_config(config)
    params = random_params(model, (16, 16), channels=1)
    average = random_params(model, (16, 16), channels=1, seed=1)
    workdir = tmp_path_factory.mktemp("runs") / "digits"
    names = tuple("0123456789")
    return write_run(workdir, config, class_names=names, params=params, ema_params=average)


@pytest.fixture(scope="module")
def digit_files(tmp_path_factory):
    """A folder with the first test digits as PNGs, and their labels."""
    folder = tmp_path_factory.mktemp("digits")
    source = input_pipeline.open_source("digits", None, "test")
    labels = []
    for i in range(40):
        encoded, label = source.fetch(i)
        (folder / f"{i:03}.png").write_bytes(encoded.numpy())
        labels.append(int(label))
    return folder, labels


def test_files_have_the_probabilities_that_evaluation_computes(digits_run, digit_files):
    folder, labels = digit_files
    classifier = vit_jax.Classifier.load(digits_run)
    source = input_pipeline.open_files([str(folder)])  # 40 images: a whole batch, and a part of one
    results = list(predict.predictions(classifier, source))
    assert [index for index, _, _ in results] == list(range(40))
    rows = np.stack([probabilities for _, _, probabilities in results])
    target = evaluate.open_run(digits_run, split="test[:40]")
    evaluation = evaluate.evaluate(target).metrics
    assert (rows.argmax(axis=1) == labels).mean() == pytest.approx(evaluation["accuracy"])
    loss = -np.log(rows[np.arange(40), labels]).mean()
    assert loss == pytest.approx(evaluation["loss"], rel=1e-5)
    images = [np.asarray(Image.open(file)) for file in sorted(folder.iterdir())]
    np.testing.assert_allclose(classifier.probabilities(images), rows, atol=1e-6)


def run_main(*args) -> int:
    """Calls predict.main with flags as on the command line; returns the exit code."""
    with flagsaver.flagsaver():
        paths = flags.FLAGS(["predict.py", *map(str, args)])[1:]
        with contextlib.suppress(SystemExit):
            predict.main(paths)
            return 0
    return 1


def test_command_line(digits_run, digit_files, tmp_path, capfd):
    """Prints text with a picture, or JSON, and reports files that aren't images."""
    folder, picture = tmp_path / "images", tmp_path / "attention.png"
    (folder / "below").mkdir(parents=True)
    shutil.copy(digit_files[0] / "000.png", folder / "below" / "a.png")
    shutil.copy(digit_files[0] / "001.png", folder / "b.png")
    no_image = folder / "no_image.png"
    no_image.write_text("hello")

    options = (f"--workdir={digits_run}", "--top=3")
    assert run_main(*options, f"--attention={picture}", folder) == 1
    output = capfd.readouterr()
    assert "no_image.png: it isn't a JPEG or PNG that can be read" in output.out + output.err
    lines = [line for line in output.out.splitlines() if "%" in line]
    assert lines[0].startswith(str(folder / "b.png"))
    assert len(lines) == 6
    assert f"{picture}: 2 images" in output.out
    assert picture.read_bytes().startswith(b"\x89PNG")

    assert run_main(*options, "--json", folder) == 1
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("{")]
    rows = {row["image"]: row for row in map(json.loads, lines)}
    assert rows[str(no_image)]["error"] == "it isn't a JPEG or PNG that can be read"
    best = rows[str(folder / "b.png")]["classes"]
    assert len(best) == 3
    assert best[0]["probability"] >= best[1]["probability"]

    with pytest.raises(UserError, match="None of the given files is an image that can be read"):
        run_main(*options, no_image)


@pytest.mark.slow
def test_command_line_in_a_process_of_its_own(digits_run, digit_files, tmp_path):
    """Only the results go to stdout."""
    done = run_script("predict.py", f"--workdir={digits_run}", "--json", str(digit_files[0]))
    assert done.returncode == 0
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 40
    (tmp_path / "no_image.png").write_text("hello")
    done = run_script("predict.py", f"--workdir={digits_run}", str(tmp_path / "no_image.png"))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "None of the given files is an image that can be read"


def test_mistakes(digits_run, tmp_path):
    model, params, _ = random_model(num_classes=None)
    pretrained.save(params, tmp_path / "bare.npz", "google", model=model)
    bare = quick_config(init_from=str(tmp_path / "bare.npz"), image_size=32)
    bare.model.update(width=32, depth=2, num_heads=4, mlp_dim=64, patch_size=8, pool="cls")
    bare.dataset.channels = 3
    image, empty = tmp_path / "images" / "a.png", tmp_path / "names.txt"
    image.parent.mkdir()
    image.touch()
    empty.write_text("\n")
    for call, message in (
        (lambda: predict.main([]), "No images are given"),
        (lambda: predict.load(None, None, None), "Nothing to predict with: give --workdir"),
        (lambda: predict.load(tmp_path / "none", None, None), "There is no"),
        (lambda: predict.load(None, quick_config(), None), "--config.init_from=PATH"),
        (lambda: predict.load("a", None, "b"), "exclude each other"),
        (lambda: predict.load(None, bare, None), "no head"),
        (lambda: predict.load(digits_run, None, None, ["a"]), "class_names has 1 names"),
        (lambda: checks.check_png("--attention", "a.jpg"), "must be a .png file"),
        (lambda: checks.check_png("--attention", "nowhere/a.png"), "in an existing folder"),
        (lambda: input_pipeline.open_files([str(digits_run)]), "has no images"),
        (
            lambda: predict.check_not_an_input(str(image), input_pipeline.open_files([str(image)])),
            "would overwrite an image",
        ),
        (lambda: weights.read_class_names(empty), "is empty; it must have the name of a class"),
    ):
        with pytest.raises(UserError, match=message):
            call()


@pytest.mark.slow
def test_weights_for_a_preset_in_prediction_and_evaluation(digits_run, tmp_path):
    """--config.init_from takes a run, or a checkpoint's parameters or their average."""
    result = evaluate.evaluate(evaluate.open_run(digits_run)).metrics
    config = quick_config(init_from=str(digits_run))
    weights = evaluate.evaluate(evaluate.open_weights(config)).metrics
    assert weights == pytest.approx(result, rel=1e-6)
    classifier = predict.load(None, config, None)
    assert classifier.class_names == tuple("0123456789")

    checkpoint = digits_run / "checkpoints" / "60"
    params = predict.load(None, quick_config(init_from=str(checkpoint / "params")), None).params
    average = quick_config(init_from=str(checkpoint / "ema_params"))
    assert_same(predict.load(None, average, None).params, classifier.params)
    different = params["head"]["bias"] != classifier.params["head"]["bias"]
    assert different.all()

    model = tiny_model(num_classes=7, patch_size=4)
    params = random_params(model, (16, 16), channels=1)
    pretrained.save(params, tmp_path / "w.npz", "google", model=model)
    config = quick_config(init_from=str(tmp_path / "w.npz"))
    config.model.update(pool="cls", posemb="learned", width=32, depth=2, num_heads=4, mlp_dim=64)
    with pytest.raises(UserError, match="has a head for 7 classes; the model needs one for 10"):
        evaluate.open_weights(config)


def test_run_without_an_average(digits_run, tmp_path):
    run = shutil.copytree(digits_run, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"ema_decay": None}))
    with pytest.raises(UserError, match="has no average"):
        weights.read(run / "checkpoints" / "60" / "ema_params")
    params = vit_jax.Classifier.load(run / "checkpoints" / "60" / "params").params
    model = models.from_config(run_folder.read_config(run))
    assert_same(params, pretrained.load(run, model))
