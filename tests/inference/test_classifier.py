"""The classifier: published files, settings of the weights, images of all kinds."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest
from conftest import GOLDEN, init, tiny_model
from PIL import Image
from published import CASES, compute_logits, random_model, random_params, write_run
from whole_runs import quick_config

import vit_jax
from vit_jax import models, pretrained
from vit_jax.errors import UserError
from vit_jax.training import losses


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """The classifier of a random model of digits, loaded from a run's folder."""
    config = quick_config(num_classes=10)
    params = random_params(models.from_config(config), (16, 16), channels=1)
    workdir = tmp_path_factory.mktemp("runs") / "digits"
    write_run(workdir, config, class_names=tuple("0123456789"), params=params)
    return vit_jax.Classifier.load(workdir)


def test_probabilities_do_not_depend_on_the_batch(classifier):
    images = np.uint8(np.random.default_rng(0).integers(0, 256, (35, *classifier.image_size, 1)))
    together = classifier.probabilities(images)
    assert together.shape == (35, 10)
    np.testing.assert_allclose(together.sum(axis=1), 1.0, atol=1e-5)
    alone = np.concatenate([classifier.probabilities(images[i : i + 1]) for i in (0, 31, 34)])
    np.testing.assert_allclose(alone, together[[0, 31, 34]], atol=1e-5)
    assert classifier([]) == []


def test_attention_sums_to_one(classifier):
    images = np.uint8(np.random.default_rng(0).integers(0, 256, (5, *classifier.image_size, 1)))
    maps = classifier.attention(images)
    assert maps.shape == (5, *classifier.model.grid(classifier.image_size))
    np.testing.assert_allclose(maps.sum(axis=(1, 2)), 1.0, atol=1e-5)


def test_features_of_images_are_those_that_the_head_sees(classifier):
    images = np.uint8(np.random.default_rng(0).integers(0, 256, (3, 20, 20)))
    patches, pooled = classifier.patch_features(images), classifier.pooled_features(images)
    assert patches.shape == (3, *classifier.model.grid(classifier.image_size), 64)
    assert (classifier.model.pool, classifier.model.pool_norm) == ("gap", "before")
    np.testing.assert_allclose(patches.mean(axis=(1, 2)), pooled, atol=1e-5)
    head = classifier.params["head"]
    logits = pooled @ np.asarray(head["kernel"]) + np.asarray(head["bias"])
    np.testing.assert_allclose(jax.nn.softmax(logits), classifier.probabilities(images), atol=1e-5)


@pytest.mark.parametrize("name", ["google_token", "hf_vit", "timm_avg_fcnorm", "google_hybrid"])
def test_published_files_bring_their_model(name):
    case = CASES[name]
    path, expected = GOLDEN / case["weights"], np.load(GOLDEN / case["expected"])
    if name.startswith("timm"):  # no published size has its width
        with pytest.raises(UserError, match=r"has width 32: give num_heads \(--num_heads\)"):
            vit_jax.Classifier.load(path)
    classifier = vit_jax.Classifier.load(path, num_heads=case["num_heads"])
    assert classifier.image_size == expected["images"].shape[1:3]
    logits = compute_logits(classifier.model, classifier.params, expected["images"])
    np.testing.assert_allclose(logits, expected["logits"], atol=2e-5, rtol=2e-5)
    assert classifier.class_name(3) == "class 3"


def test_settings_of_the_weights_are_used(tmp_path):
    model, params, _ = random_model(gelu="exact", num_classes=3)
    names = ["cat", "dog", "emu"]
    settings = dict(class_names=names, mean=(0.4,), std=(0.2,))
    pretrained.save(params, tmp_path / "hf", "hf", model=model, **settings)
    classifier = vit_jax.Classifier.load(tmp_path / "hf")
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3)).astype(np.uint8)
    normalized = np.float32((images / 255 - 0.4) / 0.2)
    expected = np.exp(compute_logits(model, params, normalized))
    expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(classifier.probabilities(images), expected, atol=1e-5)
    assert {name for name, _ in classifier(images)[0]} == set(names)
    with pytest.raises(UserError, match="class_names has 2 names; .* 3 classes"):
        vit_jax.Classifier.load(tmp_path / "hf", class_names=["a", "b"])


def test_loss_determines_the_probabilities(monkeypatch):
    model, params, _ = random_model(num_classes=3, depth=1)
    images = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3)).astype(np.uint8)
    logits = compute_logits(model, params, np.float32(images / 127.5 - 1))

    def classifier(loss):
        return vit_jax.Classifier(model, params, (32, 32), loss=loss)

    sigmoid = classifier("sigmoid").probabilities(images)
    np.testing.assert_allclose(sigmoid, 1 / (1 + np.exp(-logits)), atol=1e-5)
    with pytest.raises(UserError, match="config.loss is 'hinge'; it must be 'softmax' or 'sig"):
        classifier("hinge")
    hinge = losses.Loss(function=None, probabilities=lambda logits: logits * 0 + 0.25)
    monkeypatch.setattr(losses, "create", lambda name: hinge)
    assert (classifier("hinge").probabilities(images) == 0.25).all()


def test_images_of_all_kinds(classifier):
    """PIL images of any mode, one image instead of a list, and values that aren't images."""
    gray = np.uint8(np.random.default_rng(0).integers(0, 256, (16, 16)))
    expected = classifier([gray])
    color = Image.fromarray(gray).convert("RGB")
    for image in (color, color.convert("CMYK"), color.convert("RGBA"), color.convert("LA")):
        names = [name for name, _ in classifier([image])[0]]
        assert names == [name for name, _ in expected[0]]
    assert classifier(Image.fromarray(gray)) == expected
    assert len(classifier(np.asarray(color))) == 1
    palette = color.quantize(256)
    rows = classifier.probabilities([palette, palette.convert("RGB")])
    np.testing.assert_array_equal(rows[0], rows[1])
    for one in (gray, gray[..., None], jax.numpy.asarray(gray), jax.numpy.asarray(gray[..., None])):
        assert classifier(one) == expected
    assert classifier(jax.numpy.asarray(gray[None])) == expected
    for invalid in (np.zeros((2, 16, 16, 1), np.float32), [gray / 255], None):
        with pytest.raises(UserError, match="must be a PIL image, or uint8"):
            classifier(invalid)
    for empty in (np.zeros((0, 8, 3), np.uint8), [np.zeros((8, 0), np.uint8)]):
        with pytest.raises(UserError, match="so it is empty"):
            classifier(empty)


def test_the_number_of_classes_to_return(classifier):
    image = np.zeros((16, 16), np.uint8)
    assert len(classifier(image, top=20)[0]) == 10
    for top in (0, -1, 2.0):
        with pytest.raises(UserError, match=f"top is {top}; it must be a whole number >= 1"):
            classifier(image, top=top)


def test_settings_that_do_not_fit_are_refused(classifier):
    for settings, message in (
        (dict(std=(0.0,)), "std, for pixels"),
        (dict(mean=(127.5,)), "mean, for pixels"),
        (dict(eval_crop=87.5), "eval_crop is 87.5"),
        (dict(eval_method="box"), "eval_method is 'box'"),
        (dict(class_names="0123456789"), "class_names is a str"),
        (dict(image_size=64), "the parameters have positions for"),
    ):
        with pytest.raises(UserError, match=message):
            dataclasses.replace(classifier, **settings)
    path = GOLDEN / CASES["timm_token"]["weights"]
    for num_heads in (5, 0, 4.0):
        with pytest.raises(UserError, match=f"num_heads is {num_heads}; it must divide the width"):
            vit_jax.Classifier.load(path, num_heads=num_heads)


@pytest.mark.parametrize("size", [0, 16.0, (16, 16, 3)])
def test_sizes_that_are_none(classifier, size):
    with pytest.raises(UserError, match="image_size is .*; it must be a number of pixels"):
        dataclasses.replace(classifier, image_size=size)


def test_models_that_do_not_classify_images(tmp_path):
    model, params, _ = random_model(gelu="exact", num_classes=None)
    pretrained.save(params, tmp_path / "hf", "hf", model=model)
    with pytest.raises(UserError, match="no head, so it returns features"):
        vit_jax.Classifier.load(tmp_path / "hf")
    with pytest.raises(UserError, match="classifies each patch"):
        vit_jax.Classifier(tiny_model(pool="none"), {}, (32, 32))


def test_few_sizes_of_batches_are_compiled(classifier):
    sizes = set()

    def spy(params, views):
        sizes.add(len(views))
        return views.reshape(len(views), -1)

    images = np.arange(8, dtype=np.uint8)[:, None, None, None] + np.zeros((16, 16, 1), np.uint8)
    for n in range(8):
        rows = classifier.map_batches(spy, images[:n], 4)
        np.testing.assert_array_equal(rows[:, 0], np.arange(n))
    assert sizes == {1, 2, 4}


def test_paths_and_images_with_channels_first_are_refused():
    model = tiny_model()
    params = init(model, np.zeros((1, 32, 32, 3)))["params"]
    classifier = vit_jax.Classifier(model=model, params=params, image_size=(32, 32))
    for path in ("a.png", pathlib.Path("a.png"), ["a.png"]):
        with pytest.raises(UserError, match="An image is the path 'a.png': open it with"):
            classifier(path)
    with pytest.raises(UserError, match=r"\(3, 32, 32\): a color image must be \(H, W, 3\)"):
        classifier(np.zeros((3, 32, 32), np.uint8))
    assert len(classifier(np.zeros((3, 32, 32, 1), np.uint8))) == 3
