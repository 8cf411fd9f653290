"""Exported artifacts: the same probabilities, without Flax; damaged ones, and where they go."""

import dataclasses
import json
import shutil
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from published import random_model, random_params, write_run
from whole_runs import ROOT, quick_config

import vit_jax
from vit_jax import models
from vit_jax.errors import UserError
from vit_jax.inference import export
from vit_jax.models import attention


def random_classifier(loss="softmax", **fields):
    model, params, _ = random_model(**{"depth": 1, **fields})
    return vit_jax.Classifier(model, params, (32, 32), class_names=tuple("abcdefghij"), loss=loss)


def random_images(n=5, size=(32, 32)):
    return np.random.default_rng(0).integers(0, 256, (n, *size, 3), np.uint8)


@pytest.fixture(scope="module")
def classifier():
    return random_classifier()


@pytest.fixture(scope="module")
def artifact(classifier, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "artifact"
    export.save(classifier, folder)
    return folder


@pytest.mark.parametrize(
    "fields",
    [
        dict(pool="map", depth=2, scan=True),
        dict(pool="gap", posemb="sincos2d", dtype="bfloat16", loss="sigmoid"),
        pytest.param(
            dict(resnet=dict(num_layers=(1, 1), width_factor=1), patch_size=1),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_probabilities_are_those_of_the_original(fields, tmp_path, monkeypatch):
    """Whatever attention is the fastest on the machine that exports, and the run's dtype."""
    classifier = random_classifier(**fields)
    with monkeypatch.context() as patch:
        patch.setattr(attention, "fastest", lambda *args: "cudnn")
        export.save(classifier, tmp_path)
    exported = vit_jax.Exported.load(tmp_path)
    assert exported.program.platforms == ("cpu", "cuda", "tpu")
    in_float32 = classifier.model.clone(dtype=jnp.float32)
    classifier = dataclasses.replace(classifier, model=in_float32)
    images = random_images(33)  # a whole batch, and a part of one
    expected = classifier.probabilities(images)
    np.testing.assert_allclose(exported.probabilities(images), expected, atol=1e-6)


def test_it_is_called_like_the_original(artifact, classifier):
    """With images of other sizes, and with none; names are those of the classes."""
    exported = vit_jax.Exported.load(artifact)
    images = list(random_images(2, (50, 40)))
    for best, expected in zip(exported(images, top=3), classifier(images, top=3), strict=True):
        assert [name for name, _ in best] == [name for name, _ in expected]
    assert exported([]) == []
    with pytest.raises(UserError, match="top is 0"):
        exported(images, top=0)


@pytest.mark.slow
def test_neither_flax_nor_the_model_is_needed(artifact, classifier, tmp_path):
    np.save(tmp_path / "images.npy", random_images())
    blocked = ("flax", "optax", "orbax", "ml_collections", "tensorflow", "vit_jax.models")
    code = f"""
import sys
for name in {blocked}:
    sys.modules[name] = None  # an import of it raises
import numpy as np, vit_jax
exported = vit_jax.Exported.load({str(artifact)!r})
np.save("rows.npy", exported.probabilities(np.load("images.npy")))
"""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    expected = classifier.probabilities(random_images())
    np.testing.assert_allclose(np.load(tmp_path / "rows.npy"), expected, atol=1e-6)


def edit_description(folder, **fields):
    path = folder / "artifact.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_artifacts_that_cannot_be_loaded(artifact, tmp_path):
    def flip_a_bit(folder):
        path = folder / "params.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    for i, (damage, message) in enumerate(
        (
            (shutil.rmtree, "There is no"),
            (lambda folder: (folder / "artifact.json").unlink(), "no exported artifact"),
            (lambda folder: (folder / "artifact.json").write_text("{"), "json is damaged"),
            (lambda folder: edit_description(folder, version=2), "has the version 2; .* version 1"),
            (lambda folder: edit_description(folder, format="onnx"), "an artifact for onnx"),
            (lambda folder: edit_description(folder, class_names=["a"]), "class_names has 1"),
            (lambda folder: edit_description(folder, image_size=[16, 16]), "aren't the program's"),
            (lambda folder: edit_description(folder, files={}), "damaged: KeyError"),
            (lambda folder: (folder / "program.jax_export").unlink(), "program.jax_export is miss"),
            (flip_a_bit, "params.safetensors is damaged"),
        )
    ):
        folder = shutil.copytree(artifact, tmp_path / str(i))
        damage(folder)
        with pytest.raises(UserError, match=message):
            vit_jax.Exported.load(folder)


def test_program_that_this_jax_cannot_read(artifact, tmp_path, monkeypatch):
    folder = shutil.copytree(artifact, tmp_path / "artifact")
    edit_description(folder, jax="99.0")
    monkeypatch.setattr(export, "read_file", lambda path, sha256: b"from the future" * 10)
    with pytest.raises(UserError, match="was exported by JAX 99.0, and JAX .* can't read it"):
        vit_jax.Exported.load(folder)


def test_an_artifact_is_replaced_whole_or_not_at_all(artifact, tmp_path):
    folder = shutil.copytree(artifact, tmp_path / "artifact")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    other = random_classifier(pool="gap")
    obstacle = folder / "params.safetensors.tmp"
    obstacle.mkdir()  # can't be written to
    with pytest.raises(UserError, match="can't be written"):
        export.save(other, folder)
    shutil.rmtree(obstacle, ignore_errors=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    export.save(other, folder)
    rows = vit_jax.Exported.load(folder).probabilities(random_images())
    np.testing.assert_allclose(rows, other.probabilities(random_images()), atol=1e-6)


def test_command_line(tmp_path, capsys):
    config = quick_config(num_classes=10)
    params = random_params(models.from_config(config), (16, 16), channels=1)
    run = write_run(tmp_path / "run", config, class_names=tuple("0123456789"), params=params)
    (tmp_path / "file").write_text("")
    for target, message in (
        (run, "has other files, such as checkpoints"),
        (run / "checkpoints" / "artifact", "among a run's checkpoints"),
        (tmp_path / "file", "is a file"),
    ):
        assert export.main([str(run), str(target)]) == 2
        assert message in capsys.readouterr().err
    assert export.main([str(tmp_path / "none"), str(tmp_path / "a")]) == 2
    assert "There is no" in capsys.readouterr().err
    assert export.main([str(run), str(tmp_path / "a")]) == 0
    assert "program.jax_export" in capsys.readouterr().out
    assert export.main([str(run), str(tmp_path / "a")]) == 2
    assert "/a exists: write to another path, or add --overwrite" in capsys.readouterr().err
    assert export.main([str(run), str(tmp_path / "a"), "--overwrite"]) == 0
    exported, classifier = vit_jax.Exported.load(tmp_path / "a"), vit_jax.Classifier.load(run)
    assert exported.class_names == classifier.class_names
    assert exported.channels == 1
    for name in ("eval_crop", "eval_method"):
        assert getattr(exported, name) == getattr(classifier, name)
    image = np.random.default_rng(0).integers(0, 256, (20, 30), np.uint8)
    rows = exported.probabilities(image)
    np.testing.assert_allclose(rows, classifier.probabilities(image), atol=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of jax2onnx
def test_onnx(tmp_path):
    """onnxruntime computes the same, for any number of images."""
    pytest.importorskip("jax2onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    for i, fields in enumerate(
        (
            dict(pool="cls", representation_size=16),
            dict(pool="gap", posemb="sincos2d", dtype="bfloat16"),
            dict(pool="map", depth=2, scan=True, gelu="exact", loss="sigmoid"),
        )
    ):
        classifier = random_classifier(**fields)
        export.save(classifier, tmp_path / str(i), "onnx")
        session = onnxruntime.InferenceSession(tmp_path / str(i) / "model.onnx")
        in_float32 = classifier.model.clone(dtype=jnp.float32)
        classifier = dataclasses.replace(classifier, model=in_float32)
        for n in (1, 3):
            (rows,) = session.run(["probabilities"], {"images": random_images(n)})
            np.testing.assert_allclose(rows, classifier.probabilities(random_images(n)), atol=1e-4)
    hybrid = dict(resnet=dict(num_layers=(1, 1), width_factor=1), patch_size=1)
    with pytest.raises(UserError, match="jax2onnx can't convert this model"):
        export.save(random_classifier(**hybrid), tmp_path / "hybrid", "onnx")


def test_onnx_without_its_packages(classifier, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    with pytest.raises(UserError, match="--format=onnx needs jax2onnx .*: pip install jax2onnx"):
        export.save(classifier, tmp_path, "onnx")
