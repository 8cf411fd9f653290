"""Images in, classes out: in Python and on the command line."""

import json
import shutil

import jax
import numpy as np
import pytest
from conftest import GOLDEN, tiny_model
from PIL import Image
from published import CASES
from test_export import drawn
from whole_runs import quick_config, run_script

import evaluate
import input_pipeline
import predict
import train
import vit_jax
from vit_jax import models, pretrained
from vit_jax.errors import UserError
from vit_jax.pretrained import export, weights
from vit_jax.runs import run_folder


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    """A short run, and its last evaluation."""
    workdir = tmp_path_factory.mktemp("runs") / "digits"
    return workdir, train.train(quick_config(total_steps=60, ema_decay=0.5), workdir)


@pytest.fixture(scope="module")
def digit_files(tmp_path_factory):
    """The digits for evaluation as PNGs in a folder, and their labels."""
    folder = tmp_path_factory.mktemp("digits")
    source = input_pipeline.open_source("digits", None, "test")
    labels = []
    for i in range(40):
        encoded, label = source.fetch(i)
        (folder / f"{i:03}.png").write_bytes(encoded.numpy())
        labels.append(int(label))
    return folder, labels


def test_the_same_classes_as_evaluation_counts(digits_run, digit_files):
    workdir, _ = digits_run
    folder, labels = digit_files
    files = sorted(folder.iterdir())
    classifier = vit_jax.Classifier.load(workdir)
    best = [rows[0][0] for rows in classifier([np.asarray(Image.open(f)) for f in files], top=1)]
    accuracy = evaluate.evaluate(workdir, split="test[:40]")["accuracy"]
    assert np.mean([name == str(label) for name, label in zip(best, labels, strict=True)]) == (
        pytest.approx(accuracy)
    )
    # As read from the files, whole batches and the rest.
    source = input_pipeline.open_files([str(folder)])
    results = list(predict.predictions(classifier, source))
    assert [index for index, _, _ in results] == list(range(40))
    assert [classifier.best(row)[0][0] for _, _, row in results] == best


def test_probabilities_do_not_depend_on_the_batch(digits_run):
    classifier = vit_jax.Classifier.load(digits_run[0])
    images = np.uint8(np.random.default_rng(0).integers(0, 256, (35, *classifier.image_size, 1)))
    together = classifier.probabilities(images)
    assert together.shape == (35, 10)
    np.testing.assert_allclose(together.sum(axis=1), 1.0, atol=1e-5)
    alone = np.concatenate([classifier.probabilities(images[i : i + 1]) for i in (0, 31, 34)])
    np.testing.assert_allclose(alone, together[[0, 31, 34]], atol=1e-5)
    maps = classifier.attention(images)
    assert maps.shape == (35, 4, 4)
    np.testing.assert_allclose(maps.sum(axis=(1, 2)), 1.0, atol=1e-5)
    assert classifier([]) == []


@pytest.mark.parametrize("name", ["google_token", "hf_vit", "timm_avg_fcnorm", "google_hybrid"])
def test_published_files_by_themselves(name, tmp_path):
    """The model is told from the file; the logits are the published ones'."""
    case = CASES[name]
    expected = np.load(GOLDEN / case["expected"])
    if name.startswith("timm"):  # a width of nobody's
        with pytest.raises(UserError, match="how many heads its 32 channels are: give num_heads"):
            vit_jax.Classifier.load(GOLDEN / case["weights"])
    classifier = vit_jax.Classifier.load(GOLDEN / case["weights"], num_heads=case["num_heads"])
    assert classifier.image_size == expected["images"].shape[1:3]
    logits = classifier.model.apply({"params": classifier.params}, expected["images"])
    np.testing.assert_allclose(logits, expected["logits"], atol=2e-5, rtol=2e-5)
    rows = classifier(np.uint8(np.zeros((1, *classifier.image_size, 3))), top=2)
    assert rows[0][0][0].startswith("class ")


def test_what_comes_with_the_weights_is_used(tmp_path):
    model, params, _ = drawn(dict(gelu="exact", num_classes=3))
    names = ["cat", "dog", "emu"]
    export.save(
        params, tmp_path / "hf", "hf", model=model, class_names=names, mean=(0.4,), std=(0.2,)
    )
    classifier = vit_jax.Classifier.load(tmp_path / "hf")
    assert {name for name, _ in classifier(np.zeros((1, 32, 32, 3), np.uint8))[0]} == set(names)
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3)).astype(np.uint8)
    logits = np.asarray(model.apply({"params": params}, (images / 255 - 0.4) / 0.2))
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(classifier.probabilities(images), expected, atol=1e-5)
    with pytest.raises(UserError, match="2 class names for a model of 3 classes"):
        vit_jax.Classifier.load(tmp_path / "hf", class_names=["a", "b"])
    export.save(params, tmp_path / "b", "hf", model=model)
    model, params, _ = drawn(dict(gelu="exact", num_classes=None))
    export.save(params, tmp_path / "bare", "hf", model=model)
    with pytest.raises(UserError, match="no head: it gives features"):
        vit_jax.Classifier.load(tmp_path / "bare")


def test_the_command_line(digits_run, digit_files, tmp_path):
    workdir, folder = digits_run[0], tmp_path / "images"
    (folder / "below").mkdir(parents=True)
    shutil.copy(digit_files[0] / "000.png", folder / "below" / "a.png")
    shutil.copy(digit_files[0] / "001.png", folder / "b.png")
    (folder / "no_image.png").write_text("hello")
    picture = tmp_path / "attention.png"
    flags = (f"--workdir={workdir}", "--top=3")
    done = run_script("predict.py", *flags, f"--attention={picture}", str(folder))
    assert done.returncode == 1
    assert "no_image.png: it can't be read or decoded" in done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith(str(folder / "b.png"))
    assert len([line for line in lines if "%" in line]) == 6
    assert picture.read_bytes().startswith(b"\x89PNG")

    done = run_script("predict.py", *flags, "--json", str(folder))
    rows = {row["image"]: row for row in map(json.loads, done.stdout.splitlines())}
    assert "error" in rows[str(folder / "no_image.png")]
    best = rows[str(folder / "b.png")]["classes"]
    assert len(best) == 3
    assert best[0]["probability"] >= best[1]["probability"]

    done = run_script("predict.py", f"--workdir={workdir}", str(folder / "no_image.png"))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "None of the files given is an image that can be read"


def test_kinds_of_images(digits_run):
    """What a notebook may hand over: PIL's of any mode, one alone, other numbers."""
    classifier = vit_jax.Classifier.load(digits_run[0])
    grey = np.uint8(np.random.default_rng(0).integers(0, 256, (16, 16)))
    expected = classifier([grey])
    colours = Image.fromarray(grey).convert("RGB")
    for image in (colours, colours.convert("CMYK"), colours.convert("RGBA"), colours.convert("LA")):
        names = [name for name, _ in classifier([image])[0]]
        assert names == [name for name, _ in expected[0]]
    assert classifier(Image.fromarray(grey)) == expected
    assert len(classifier(np.asarray(colours))) == 1
    paletted = colours.quantize(256)
    rows = classifier.probabilities([paletted, paletted.convert("RGB")])
    np.testing.assert_array_equal(rows[0], rows[1])
    for strange in (np.zeros((2, 16, 16, 1), np.float32), [grey / 255], ["a.png"]):
        with pytest.raises(UserError, match="expected uint8"):
            classifier(strange)


def test_mistakes(digits_run, tmp_path):
    model, params, _ = drawn(dict(num_classes=None))
    export.save(params, tmp_path / "bare.npz", "google", model=model)
    bare = quick_config(init_from=str(tmp_path / "bare.npz"), image_size=32)
    bare.model.update(width=32, depth=2, num_heads=4, mlp_dim=64, patch_size=8, pool="cls")
    bare.dataset.channels = 3
    for load, match in (
        (lambda: predict.main([]), "No image is named"),
        (lambda: predict.load(None, None, None), "--workdir=FOLDER is missing"),
        (lambda: predict.load(tmp_path / "none", None, None), "There is no"),
        (lambda: predict.load(None, quick_config(), None), "--config.init_from=PATH"),
        (lambda: predict.load("a", None, "b"), "exclude each other"),
        (lambda: predict.load(None, bare, None), "no head"),
        (lambda: predict.load(digits_run[0], None, None, ["a"]), "There are 1 class names"),
        (lambda: predict.check_png("a.jpg"), "it takes a .png file"),
        (lambda: predict.check_png("nowhere/a.png"), "in a folder that exists"),
        (lambda: input_pipeline.open_files([str(tmp_path)]), "has no images"),
    ):
        with pytest.raises(UserError, match=match):
            load()


def test_weights_for_the_model_of_a_preset(digits_run, tmp_path):
    """In predict.py and evaluate.py alike: `--config=... --config.init_from=...`."""
    workdir, result = digits_run
    config = quick_config(total_steps=60, init_from=str(workdir))
    assert evaluate.evaluate_weights(config) == pytest.approx(result, rel=1e-6)
    assert predict.load(None, config, None).class_names == tuple("0123456789")
    raw = quick_config(init_from=str(workdir / "checkpoints" / "60" / "params"))
    assert evaluate.evaluate_weights(raw)["loss"] != pytest.approx(result["loss"], rel=1e-6)
    average = quick_config(init_from=str(workdir / "checkpoints" / "60" / "ema_params"))
    assert evaluate.evaluate_weights(average) == pytest.approx(result, rel=1e-6)

    model = tiny_model(num_classes=7, patch_size=4)
    images = np.zeros((1, 16, 16, 1), np.float32)
    params = model.init(jax.random.key(0), images)["params"]
    export.save(params, tmp_path / "w.npz", "google", model=model)
    config = quick_config(init_from=str(tmp_path / "w.npz"))
    config.model.update(pool="cls", posemb="learned", width=32, depth=2, num_heads=4, mlp_dim=64)
    with pytest.raises(UserError, match="a head for 7 classes, where this model has 10"):
        evaluate.evaluate_weights(config)


def test_a_run_without_an_average_has_none(digits_run, tmp_path):
    run = shutil.copytree(digits_run[0], tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"ema_decay": None}))
    with pytest.raises(UserError, match="keeps no average"):
        weights.read(run / "checkpoints" / "60" / "ema_params")
    params = vit_jax.Classifier.load(run / "checkpoints" / "60" / "params").params
    model = models.from_config(run_folder.read_config(run))
    jax.tree.map(np.testing.assert_array_equal, params, pretrained.load(run, model))
