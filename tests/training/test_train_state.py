"""The train and eval steps: losses, accumulation, EMA, meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import randomized, tiny_model

from vit_jax.errors import UserError
from vit_jax.parallel import feeding, sharding
from vit_jax.parallel import mesh as meshes
from vit_jax.training import augment, losses, metrics, optim, steps, train_state

IMAGE = (32, 32, 3)


@pytest.fixture(scope="module")
def batches():
    rng = np.random.default_rng(0)
    return [
        {
            "images": rng.integers(0, 256, (16, *IMAGE), np.uint8),
            "labels": rng.integers(0, 10, 16).astype(np.int32),
        }
        for _ in range(3)
    ]


def run(config, batches, mesh, **fields):
    """The losses and the final state of a few steps on a mesh."""
    model = tiny_model(**fields)
    params = jax.eval_shape(lambda: train_state.init_params(model, IMAGE, config.seed))
    tx, learning_rate = optim.create(config, params, config.total_steps)
    init, shapes = train_state.initializer(model, tx, IMAGE, config, mesh)
    step = steps.make_train_step(model, tx, learning_rate, config)
    step = sharding.compile_train_step(step, shapes, sharding.batch_shapes(16, IMAGE, mesh))
    state, values = init(), []
    for batch in feeding.to_devices(batches, mesh):
        state, metrics = step(state, batch)
        values.append(float(metrics["loss"]))
    return values, jax.device_get(state)


@pytest.fixture
def config(tiny_config):
    """A rate that moves the parameters, and everything random switched on by `DROP`."""
    tiny_config.update(batch_size=16, ema_decay=0.9)
    tiny_config.schedule.update(base_lr=3e-3, warmup_steps=0)
    tiny_config.augment.label_smoothing = 0.1
    return tiny_config


DROP = dict(dropout_rate=0.1, attention_dropout_rate=0.1, stochastic_depth_rate=0.2)


def assert_close(state, other, rtol=1e-4, atol=1e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=rtol, atol=atol
        ),
        (state.params, state.ema_params),
        (other.params, other.ema_params),
    )


def test_the_same_run_twice_has_the_same_bits(config, batches, one_device):
    values, state = run(config, batches, one_device, **DROP)
    again, other = run(config, batches, one_device, **DROP)
    assert values == again
    jax.tree.map(np.testing.assert_array_equal, state, other)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


EVERYTHING = DROP | dict(remat="full", scan=True)


@pytest.mark.parametrize(
    ("axes", "fields"),
    [
        (dict(data=2, fsdp=2, tensor=2), EVERYTHING),
        slow(dict(data=8), EVERYTHING),
        slow(dict(fsdp=8), EVERYTHING),
        slow(dict(data=2, fsdp=4), EVERYTHING),
        slow(dict(tensor=4), EVERYTHING),
        slow(dict(data=2, fsdp=2, tensor=2), DROP),
    ],
)
def test_every_mesh_gives_the_numbers_of_one_device(
    config, batches, one_device, one_device_runs, axes, fields
):
    """With all that is drawn at random, averaged, recomputed and accumulated."""
    config.accum_steps = 2
    config.augment.mixup_alpha = 0.5
    config.optimizer.update(name="sgd", momentum_dtype="float32")  # Adam's signs blow up rounding
    config.schedule.base_lr = 0.1
    size = int(np.prod(list(axes.values())))
    mesh = meshes.create_mesh(**{"data": 1, **axes}, devices=jax.devices()[:size])
    key = tuple(fields)
    if key not in one_device_runs:
        one_device_runs[key] = run(config, batches, one_device, **fields)
    expected, reference = one_device_runs[key]
    values, state = run(config, batches, mesh, **fields)
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    assert_close(state, reference)


@pytest.fixture(scope="module")
def one_device_runs():
    """Losses and final state of one device, computed once."""
    return {}


def test_no_device_holds_more_than_its_part_of_a_new_model(config):
    """Not even for a moment: neither the arrays nor what they are drawn from."""
    mesh = meshes.create_mesh(data=1, fsdp=8)
    model = tiny_model(width=256, mlp_dim=1024)
    params = jax.eval_shape(lambda: train_state.init_params(model, IMAGE, 0))
    tx, _ = optim.create(config, params, 10)
    init, shapes = train_state.initializer(model, tx, IMAGE, config, mesh)
    memory = init.lower().compile().memory_analysis()
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    assert memory.output_size_in_bytes < whole / 7
    assert memory.temp_size_in_bytes < whole / 7


def test_accumulation_is_the_whole_batch(config, batches, one_device):
    config.optimizer.update(name="sgd", momentum_dtype="float32")
    expected, whole = run(config, batches, one_device)
    config.accum_steps = 4
    values, parts = run(config, batches, one_device)
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    assert_close(parts, whole)


def test_accumulation_saves_memory(config, one_device):
    """The batch stays uint8 but for the part at work."""
    image = (128, 128, 3)
    model = tiny_model(patch_size=32)
    temporaries = []
    for config.accum_steps in (1, 16):
        tx, rate = optim.create(config, train_state.init_params(model, image, 0), 10)
        _, shapes = train_state.initializer(model, tx, image, config, one_device)
        step = steps.make_train_step(model, tx, rate, config)
        batch = sharding.batch_shapes(256, image, one_device)
        step = sharding.compile_train_step(step, shapes, batch)
        temporaries.append(step.memory_analysis().temp_size_in_bytes)
    float32_batch = 256 * 4 * 128 * 128 * 3
    assert temporaries[1] < 0.75 * float32_batch < temporaries[0]


def test_dropout_differs_from_step_to_step(config, batches, one_device, monkeypatch):
    """Nothing is learned here, so that only the masks can move the loss of one batch."""
    config.schedule.base_lr = 0.0
    start = randomized(train_state.init_params(tiny_model(), IMAGE, 0))
    monkeypatch.setattr(train_state, "init_params", lambda *_: start)
    values, _ = run(config, [batches[0]] * 3, one_device, **DROP)
    assert len(set(values)) == 3


def test_ema_follows_the_parameters(config, batches, one_device):
    _, state = run(config, batches[:1], one_device)
    start = train_state.init_params(tiny_model(), IMAGE, config.seed)
    expected = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, start, state.params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.ema_params, expected
    )
    assert state.eval_params is state.ema_params


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_step_that_is_not_finite_is_skipped(config, batches, one_device, optimizer, monkeypatch):
    """As if its batch hadn't been there, but that the step and the schedule count it."""

    def poisoned(logits, targets):  # where all labels are 9
        return losses.softmax_cross_entropy(logits, targets) + jnp.log(
            jnp.where(targets[:, 9].min() > 0.5, -1, 1)
        )

    monkeypatch.setattr(losses, "create", lambda *_: losses.Loss(poisoned, None))
    config.on_nonfinite = "skip"
    config.optimizer.name = optimizer
    config.schedule.name = "constant"
    bad = {"images": batches[1]["images"], "labels": np.full(16, 9, np.int32)}
    values, state = run(config, [batches[0], bad, batches[2]], one_device)
    expected, without = run(config, [batches[0], batches[2]], one_device)
    assert np.isnan(values[1])
    assert [values[0], values[2]] == expected
    jax.tree.map(
        np.testing.assert_array_equal,
        (state.params, state.ema_params, optax.tree.get_all_with_path(state.opt_state, "mu")),
        (without.params, without.ema_params, optax.tree.get_all_with_path(without.opt_state, "mu")),
    )
    assert (state.step, state.skipped, without.skipped) == (3, 1, 0)
    schedules = [
        leaf.count
        for leaf in jax.tree.leaves(
            state.opt_state, is_leaf=lambda leaf: isinstance(leaf, optax.ScaleByScheduleState)
        )
        if isinstance(leaf, optax.ScaleByScheduleState)
    ]
    assert schedules == [3]


def test_fsdp_and_tensor_split_the_state(config):
    mesh = meshes.create_mesh(data=1, fsdp=2, tensor=4)
    model = tiny_model()
    tx, _ = optim.create(config, train_state.init_params(model, IMAGE, 0), 10)
    init, _ = train_state.initializer(model, tx, IMAGE, config, mesh)
    state = init()
    block = state.params["Transformer"]["encoderblock_0"]
    attention = block["MultiHeadDotProductAttention_0"]
    for kernel, shard in (
        (attention["query"]["kernel"], (16, 1, 8)),
        (attention["out"]["kernel"], (1, 8, 16)),
        (block["MlpBlock_0"]["Dense_0"]["kernel"], (16, 16)),
        (block["MlpBlock_0"]["Dense_1"]["kernel"], (16, 16)),
        (state.params["head"]["kernel"], (16, 10)),
        (state.params["cls"], (1, 1, 16)),
    ):
        assert kernel.sharding.shard_shape(kernel.shape) == shard
    moments = optax.tree.get(state.opt_state, "mu")["Transformer"]["encoderblock_0"]["MlpBlock_0"]
    kernel = moments["Dense_0"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (16, 16)


def test_layer_axis_of_stacked_blocks_is_not_split():
    mesh = meshes.create_mesh(data=1, fsdp=8)
    name = "params/Transformer/encoderblock/MlpBlock_0/Dense_0/"
    assert "fsdp" not in sharding.partition(f"{name}bias", (8, 64), mesh)
    assert sharding.partition(f"{name}kernel", (64, 16, 32), mesh)[0] is None
    assert "fsdp" in sharding.partition(f"{name}kernel", (64, 16, 32), mesh)


def test_evaluation_of_padded_batches(config, one_device):
    """13 examples in batches of 8 with padding, as one by one."""
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (13, *IMAGE), np.uint8)
    labels = rng.integers(0, 10, 13).astype(np.int32)
    model = tiny_model()
    params = train_state.init_params(model, IMAGE, 0)
    params["head"]["kernel"] = jnp.asarray(rng.normal(size=(32, 10)), jnp.float32)
    step = jax.jit(steps.make_eval_step(model, config))

    def evaluate(size):
        batches = []
        for start in range(0, 13, size):
            part = slice(start, start + size)
            missing = size - len(images[part])
            batches.append(
                {
                    "images": np.pad(images[part], ((0, missing), (0, 0), (0, 0), (0, 0))),
                    "labels": np.pad(labels[part], (0, missing)),
                    "mask": np.arange(size) < size - missing,
                }
            )
        return metrics.evaluate(step, params, feeding.to_devices(batches, one_device))

    eight, one = evaluate(8), evaluate(1)
    assert eight["accuracy"] == one["accuracy"]
    assert eight["accuracy_top5"] == one["accuracy_top5"]
    assert eight["loss"] == pytest.approx(one["loss"], rel=1e-6)

    logits = np.asarray(model.apply({"params": params}, images / 127.5 - 1))
    ranks = (logits > np.take_along_axis(logits, labels[:, None], 1)).sum(1)
    assert eight["accuracy"] == pytest.approx((ranks == 0).mean())
    assert eight["accuracy_top5"] == pytest.approx((ranks < 5).mean())
    log_probabilities = np.asarray(jax.nn.log_softmax(logits))
    expected = -np.take_along_axis(log_probabilities, labels[:, None], 1).mean()
    assert eight["loss"] == pytest.approx(expected, rel=1e-5)


def test_examples_without_labels_are_not_scored(config, one_device):
    step = jax.jit(steps.make_eval_step(tiny_model(), config))
    params = train_state.init_params(tiny_model(), IMAGE, 0)
    batch = {
        "images": np.zeros((8, *IMAGE), np.uint8),
        "labels": np.array([-1, 1, 2, 3, 4, 5, 6, 10], np.int32),
        "mask": np.ones(8, bool),
    }
    with pytest.raises(UserError, match="2 of 8 evaluation examples have a label that isn't among"):
        metrics.evaluate(step, params, feeding.to_devices([batch], one_device))


def test_losses_against_their_formulas():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(4, 7)).astype(np.float32), np.array([0, 6, 2, 2])
    targets = np.asarray(augment.soft_labels(labels, 7, 0.2))
    np.testing.assert_allclose(targets.sum(1), 1.0, rtol=1e-6)
    np.testing.assert_allclose(targets[0], [0.8 + 0.2 / 7] + [0.2 / 7] * 6, rtol=1e-6)
    softmax = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(
        losses.create("softmax").function(logits, targets), -(targets * np.log(softmax)).sum(1), rtol=1e-5
    )
    p = 1 / (1 + np.exp(-logits))
    binary = -(targets * np.log(p) + (1 - targets) * np.log(1 - p)).sum(1)
    np.testing.assert_allclose(losses.create("sigmoid").function(logits, targets), binary, rtol=1e-5)


def test_normalisation():
    images = np.array([0, 255, 51], np.uint8).reshape(1, 1, 1, 3)
    np.testing.assert_allclose(augment.normalize(images).ravel(), [-1, 1, -0.6], atol=1e-6)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    out = augment.normalize(images, mean, std).ravel()
    np.testing.assert_allclose(out, (np.array([0, 1, 0.2]) - mean) / std, rtol=1e-5)


def test_mistakes_are_named(config, one_device):
    with pytest.raises(UserError, match="config.loss is 'mse'; it can be 'softmax', 'sigmoid'"):
        losses.create("mse")
    mesh = meshes.create_mesh()
    with pytest.raises(UserError, match="batch_size 12 is not divisible by 8 devices.*take 16"):
        meshes.check_batch_size(12, 1, mesh)
    with pytest.raises(UserError, match="batch_size 8 .* 1 devices x 3 accumulation steps"):
        meshes.check_batch_size(8, 3, one_device)
    with pytest.raises(UserError, match="data=3, fsdp=1, tensor=1 doesn't fit the 8 devices"):
        meshes.create_mesh(data=3)
