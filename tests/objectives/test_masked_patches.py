"""Masked patches: corruption, targets, losses, the training on any mesh, and what follows it."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import randomized, tiny_model
from published import assert_same, random_params
from whole_runs import assert_same_run, one_device_only, quick_config, rows, stop_at

import configuration
import evaluate
import train
from vit_jax import Classifier, checkpoint, models, pretrained
from vit_jax.errors import Preempted, UserError
from vit_jax.figures import command
from vit_jax.objectives import masked_patches, trained_module
from vit_jax.objectives.masked_patches import Settings
from vit_jax.parallel import feeding, sharding
from vit_jax.parallel import mesh as meshes
from vit_jax.parallel.preemption import Preemption
from vit_jax.paths import MASK_TOKEN, PATCH_HEAD, path_name
from vit_jax.training import optim, steps, train_state

IMAGE = (32, 32, 3)
EXTRA = (MASK_TOKEN, PATCH_HEAD)


@pytest.fixture
def config(tiny_config):
    tiny_config.update(objective="masked_patches", best_metric="loss", batch_size=16)
    return tiny_config


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (4, *IMAGE), np.uint8)


@pytest.mark.slow
def test_shares_of_corrupted_patches():
    """Half of each image's patches; of these 80% masked, 10% replaced by another, 10% kept."""
    n, num_patches = 2_000, 16
    keys = jax.random.split(jax.random.key(1), n)
    corruption = jax.device_get(masked_patches.draw(keys, num_patches, Settings()))
    assert (corruption.corrupted.sum(axis=1) == num_patches // 2).all()
    replaced = corruption.source != np.arange(num_patches)
    assert not (replaced & corruption.masked).any()
    assert not ((replaced | corruption.masked) & ~corruption.corrupted).any()
    total = corruption.corrupted.sum()
    assert corruption.masked.sum() / total == pytest.approx(0.8, abs=0.01)
    assert replaced.sum() / total == pytest.approx(0.1, abs=0.01)
    assert set(np.unique(corruption.source)) == set(range(num_patches))
    # What an image gets depends on its own key alone.
    alone = jax.device_get(masked_patches.draw(keys[7:8], num_patches, Settings()))
    assert_same(alone, jax.tree.map(lambda leaf: leaf[7:8], corruption))


def test_corrupted_embeddings():
    x = np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4)  # 6 patches
    flags = np.zeros((1, 6), bool)
    masked = flags.copy()
    masked[0, 1] = True
    source = np.array([[0, 1, 5, 3, 4, 5]])
    result = masked_patches.Corruption(flags, masked, source).apply(x, jnp.full((1, 1, 4), -1.0))
    expected = x.reshape(1, 6, 4).copy()
    expected[0, 1], expected[0, 2] = -1, expected[0, 5]
    np.testing.assert_array_equal(result, expected.reshape(x.shape))


def patch_of(image, index, side):
    row, column = divmod(index, image.shape[1] // side)
    return image[row * side : (row + 1) * side, column * side : (column + 1) * side] / 255


def test_targets(images):
    """Of each patch alone, in NumPy."""
    results = {
        target: np.asarray(masked_patches.targets(images, (8, 8), Settings(target)))
        for target in masked_patches.TARGETS
    }
    assert results["mean_color"].shape == (4, 16, 1)
    assert results["downsized"].shape == (4, 16, 16)
    for i, index in itertools.product(range(4), (0, 5, 14)):
        patch = patch_of(images[i], index, 8)
        np.testing.assert_allclose(results["pixels"][i, index], patch.ravel(), rtol=1e-6)
        red, green, blue = np.floor(patch.mean(axis=(0, 1)) * 8)
        assert results["mean_color"][i, index] == red * 64 + green * 8 + blue
        cells = np.floor(patch.reshape(4, 2, 4, 2, 3).mean(axis=(1, 3)) * 8) @ [64, 8, 1]
        np.testing.assert_array_equal(results["downsized"][i, index], cells.ravel())
    white = np.full((1, 8, 8, 1), 255, np.uint8)
    assert masked_patches.targets(white, (8, 8), Settings()).item() == 7  # of 8 gray classes


@pytest.mark.parametrize("target", masked_patches.TARGETS)
def test_right_predictions_are_drawn_as_the_targets(target, images):
    settings = Settings(target, bits=5)
    outputs = expected = masked_patches.targets(images, (8, 8), settings)
    if settings.predicts_colors:
        outputs = jax.nn.one_hot(expected, settings.num_colors(3)).reshape(4, 16, -1)
    drawn = masked_patches.predicted_images(outputs, IMAGE, (8, 8), settings)
    again = masked_patches.targets(np.uint8(np.round(drawn * 255)), (8, 8), settings)
    np.testing.assert_allclose(again, expected, atol=1e-6)


@pytest.mark.parametrize("target", masked_patches.TARGETS)
def test_loss_of_corrupted_patches_only(target, images):
    settings = Settings(target, bits=1)
    expected = masked_patches.targets(images, (8, 8), settings)
    num_outputs = settings.num_outputs((8, 8), 3)
    outputs = np.random.default_rng(1).normal(size=(4, 16, num_outputs)).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), 4)
    corrupted = np.asarray(masked_patches.draw(keys, 16, settings).corrupted)

    def loss(outputs):
        return masked_patches.losses(outputs, expected, corrupted, settings)["loss"]

    each = np.zeros((4, 16))
    for i, index in np.ndindex(4, 16):
        wanted, given = np.asarray(expected[i, index]), outputs[i, index]
        if target == "pixels":
            each[i, index] = np.mean((given - wanted) ** 2)
        else:
            logits = given.reshape(len(wanted), -1)
            log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
            each[i, index] = -np.mean(log_p[np.arange(len(wanted)), wanted])
    means = [row[chosen].mean() for row, chosen in zip(each, corrupted, strict=True)]
    np.testing.assert_allclose(loss(outputs), means, rtol=1e-5)
    gradient = jax.grad(lambda outputs: loss(outputs).sum())(outputs)
    np.testing.assert_array_equal(np.any(np.asarray(gradient) != 0, axis=-1), corrupted)


@pytest.mark.slow
def test_gradients_reach_the_mask_token_and_the_encoder(config, images):
    of_today = dict(reg_tokens=2, class_token=True, pre_norm=True, rope="axial", qk_norm=True)
    for pool, fields in (("cls", {}), ("gap", {}), ("gap", of_today)):
        config.model.update(pool=pool, **fields)
        model = models.from_config(config)
        module = trained_module(model, config)
        params = random_params(module)
        encoder = random_params(model)
        assert params.keys() == {*encoder, *EXTRA}
        values_of = steps.patch_values(model, config)
        keys = jax.random.split(jax.random.key(0), 4)
        loss = jax.jit(lambda p, f=values_of, k=keys: f(p, images, k)["loss"].mean())
        grads = jax.grad(loss)(params)
        for path, leaf in jax.tree.leaves_with_path(grads):
            assert np.any(np.asarray(leaf)), path_name(path)


def masked_run(config, mesh, images):
    """Returns the losses and the final parameters of three steps."""
    model = models.from_config(config)
    module = trained_module(model, config)
    params = jax.eval_shape(lambda: train_state.init_params(module, IMAGE, config.seed))
    tx, learning_rate = optim.create(config, params, config.total_steps)
    _, shapes = train_state.initializer(module, tx, IMAGE, config, mesh)
    step = steps.make_train_step(model, tx, learning_rate, config)
    step = sharding.compile_train_step(step, shapes, sharding.batch_shapes(16, IMAGE, mesh))
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    state = zeros.replace(params=jax.tree.map(lambda x: 0.3 * x, randomized(shapes.params)))
    state = jax.tree.map(lambda leaf, s: jax.device_put(leaf, s.sharding), state, shapes)
    losses = []
    labels = np.zeros(16, np.int32)
    for batch in feeding.to_devices([{"images": images, "labels": labels}] * 3, mesh):
        state, values = step(state, batch)
        losses.append([float(values[name]) for name in ("loss", "patch_accuracy")])
    return losses, jax.device_get(state.params)


@pytest.mark.slow
def test_every_mesh_computes_what_one_device_does(config, one_device):
    """With accumulation, scan, rematerialization and dropout."""
    config.accum_steps = 2
    config.num_classes = None
    config.model.update(scan=True, remat="full", dropout_rate=0.1, variant="Ti/16")
    config.optimizer.update(name="sgd", momentum_dtype="float32")  # Adam amplifies rounding
    config.schedule.update(base_lr=0.1, warmup_steps=0)
    images = np.random.default_rng(0).integers(0, 256, (16, *IMAGE), np.uint8)
    losses, params = masked_run(config, one_device, images)
    mesh = meshes.create_mesh(data=2, fsdp=2, tensor=2)
    others, other = masked_run(config, mesh, images)
    np.testing.assert_allclose(others, losses, rtol=1e-4)
    assert losses[0][0] != losses[2][0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), other, params)


def masked_config(**fields):
    """A quick run on masked patches of the digits, of a tiny model."""
    config = quick_config(objective="masked_patches", best_metric="loss", **fields)
    config.augment.label_smoothing = 0.0
    config.model.update(width=32, mlp_dim=64, pool="cls")
    return config


@pytest.fixture(scope="module")
def whole(tmp_path_factory, one_device):
    """A finished run."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    with one_device_only(one_device):
        train.train(masked_config(), workdir)
    return workdir


@pytest.mark.slow
def test_a_run_learns_and_resumes_to_the_bit(whole, tmp_path, monkeypatch, on_one_device):
    evaluated = [row for row in rows(whole) if "val/loss" in row]
    assert set(evaluated[0]) == {"step", "val/loss", "val/patch_accuracy"}
    assert evaluated[-1]["val/loss"] < evaluated[0]["val/loss"] < np.log(8)
    with monkeypatch.context() as patch:
        patch.setattr(Preemption, "sync", stop_at(33))
        with pytest.raises(Preempted):
            train.train(masked_config(), tmp_path / "stopped")
    train.train(masked_config(), tmp_path / "stopped")
    assert_same_run(tmp_path / "stopped", whole)


@pytest.mark.slow
def test_fine_tuning_takes_the_encoder(whole, tmp_path, on_one_device):
    """With its class token and positions, to the bit; the new head starts at zero."""
    _, params = checkpoint.restore_params(whole)
    config = quick_config(total_steps=1, init_from=str(whole))
    config.model.update(width=32, mlp_dim=64, pool="cls")
    config.schedule.update(base_lr=0.0, warmup_steps=0)  # the parameters stay as they start
    train.train(config, tmp_path / "tuned")
    _, tuned = checkpoint.restore_params(tmp_path / "tuned")
    head = tuned.pop("head")
    assert not head["kernel"].any()
    assert_same(tuned, {name: params[name] for name in params if name not in EXTRA})
    assert "cls" in tuned


@pytest.mark.slow
def test_masked_training_starts_from_weights(whole, tmp_path, on_one_device):
    """The mask token and the head of patches are new."""
    config = masked_config(total_steps=1, init_from=str(whole))
    config.schedule.update(base_lr=0.0, warmup_steps=0)
    config.masked_patches.target = "pixels"
    assert set(train.train(config, tmp_path / "more")) == {"loss"}
    _, params = checkpoint.restore_params(whole)
    _, more = checkpoint.restore_params(tmp_path / "more")
    assert not more[PATCH_HEAD]["kernel"].any()
    for tree in (params, more):
        tree.pop(PATCH_HEAD)
        tree.pop(MASK_TOKEN)
    assert_same(more, params)


@pytest.mark.slow
def test_a_run_without_classes(whole, tmp_path, capsys):
    """evaluate.py and predict.py say so in one line; its encoder and its figures can be had."""
    with pytest.raises(UserError, match="has no classes to evaluate: it was trained to predict"):
        evaluate.open_run(whole)
    with pytest.raises(UserError, match="no head, so it returns features.* masked patches"):
        Classifier.load(whole)
    config, params = checkpoint.restore_params(whole)
    encoder = pretrained.load(whole, models.from_config(config))
    assert_same(encoder, {name: params[name] for name in params if name not in EXTRA})
    assert command.main([str(whole), f"--out={tmp_path}"]) == 0
    assert f"{tmp_path / 'masked.png'}: patches that the model predicts" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"objective": "jigsaw"}, "config.objective is 'jigsaw'; it must be 'classes' or 'masked"),
        ({"masked_patches.target": "hog"}, "config.masked_patches.target is 'hog'; it must be"),
        ({"masked_patches.mask_share": 0.95}, "mask_share 0.95 and random_share 0.1 add up to"),
        ({"masked_patches.target": "downsized", "model.patch_size": 2}, "4 must divide the patch"),
        ({"model.patch_size": 16}, "images of several patches; images of 16x16"),
        ({"model.patch_drop_rate": 0.5}, "patch_drop_rate is 0.5; with .* it must be 0"),
        ({"model.pool": "map"}, "config.model.pool is for the classifier .* not 'map'"),
        ({"model.pool": "gap", "model.pool_norm": "after"}, "not 'gap' and 'after'"),
        ({"augment.mixup_alpha": 0.2}, "config.augment.mixup_alpha is 0.2; it belongs to the pred"),
        ({"best_metric": "accuracy"}, "best_metric is 'accuracy'; it must be 'loss' or 'patch_acc"),
        (
            {"best_metric": "patch_accuracy", "masked_patches.target": "pixels"},
            "'pixels' doesn't have: it must be 'loss'",
        ),
    ],
)
def test_mistakes_are_named(fields, message):
    config = masked_config()
    config.update_from_flattened_dict(fields)
    with pytest.raises(UserError, match=message):
        configuration.check(config)


def test_a_hybrid_is_refused():
    model = tiny_model(resnet=dict(num_layers=(1,), width_factor=0.5), patch_size=1)
    with pytest.raises(UserError, match="in a hybrid .* they overlap"):
        masked_patches.check(masked_config(), model, IMAGE)
