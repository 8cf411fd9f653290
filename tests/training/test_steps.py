"""The training step: meshes, accumulation, averages, randomness, updates that aren't finite."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import randomized, tiny_model

from vit_jax.parallel import feeding, sharding
from vit_jax.parallel import mesh as meshes
from vit_jax.paths import path_name
from vit_jax.runs import checkpoint
from vit_jax.training import losses, optim, steps, train_state

IMAGE = (32, 32, 3)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


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


def compile_step(config, mesh, **fields):
    """Returns (() -> a random initial state, the compiled training step) for a tiny model."""
    model = tiny_model(**fields)
    params = jax.eval_shape(lambda: train_state.init_params(model, IMAGE, config.seed))
    tx, learning_rate = optim.create(config, params, config.total_steps)
    _, shapes = train_state.initializer(model, tx, IMAGE, config, mesh)
    step = steps.make_train_step(model, tx, learning_rate, config)
    step = sharding.compile_train_step(step, shapes, sharding.batch_shapes(16, IMAGE, mesh))

    def new_state():
        zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
        params = jax.tree.map(lambda leaf: 0.3 * leaf, randomized(shapes.params))
        ema_params = None if zeros.ema_params is None else params
        state = zeros.replace(params=params, ema_params=ema_params)
        return jax.tree.map(lambda leaf, s: jax.device_put(leaf, s.sharding), state, shapes)

    return new_state, step


def take_steps(new_state, step, batches, mesh):
    """Returns the losses, and the state after each step, on the host."""
    state, losses, states = new_state(), [], []
    for batch in feeding.to_devices(batches, mesh):
        state, values = step(state, batch)
        losses.append(float(values["loss"]))
        states.append(jax.device_get(state))
    return losses, states


def run(config, batches, mesh, **fields):
    """Returns the losses and the final state of a step for each batch."""
    losses, states = take_steps(*compile_step(config, mesh, **fields), batches, mesh)
    return losses, states[-1]


@pytest.fixture
def config(tiny_config):
    """A learning rate that moves the parameters within three steps, and an average of them."""
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


@pytest.fixture
def compiled(config, one_device):
    """A state and a step with an average of the parameters and every kind of dropout."""
    return compile_step(config, one_device, **DROP)


def without_key_biases(state):
    """Their gradients are rounding, which Adafactor scales up: softmax ignores such a bias."""

    def zero(path, leaf):
        return 0 * leaf if path_name(path).endswith("key/bias") else leaf

    return jax.tree.map_with_path(zero, state)


@pytest.mark.slow
@pytest.mark.parametrize("scan", [True, False])
def test_adafactor_on_any_mesh(scan, config, batches, one_device, tmp_path):
    """FSDP changes rounding only; a state that was saved and restored goes on to the same bits."""
    config.optimizer.update(name="adafactor", min_dim_size_to_factor=8)
    mesh = meshes.create_mesh(data=2, fsdp=2, tensor=2)
    new_state, step = compile_step(config, mesh, scan=scan)
    _, states = take_steps(new_state, step, batches, mesh)
    _, alone = run(config, batches, one_device, scan=scan)
    assert_close(*map(without_key_biases, (states[-1], alone)), rtol=1e-3, atol=1e-4)

    with contextlib.closing(checkpoint.Checkpoints(tmp_path)) as checkpoints:
        shapes = sharding.shapes_of(new_state())
        first = jax.tree.map(lambda leaf, s: jax.device_put(leaf, s.sharding), states[0], shapes)
        checkpoints.save(1, first)
        checkpoints.finish_saving()
        restored = checkpoints.restore_latest(shapes, None)
    _, resumed = take_steps(lambda: restored, step, batches[1:], mesh)
    jax.tree.map(np.testing.assert_array_equal, resumed[-1], states[-1])

    kernel = "MlpBlock_0/Dense_0/kernel"
    specs = {
        path_name(path): leaf.sharding.spec for path, leaf in jax.tree.leaves_with_path(shapes)
    }
    moments = {name: spec for name, spec in specs.items() if name.endswith(kernel)}
    (parameter,) = {spec for name, spec in moments.items() if name.startswith("params/")}
    assert {spec for name, spec in moments.items() if "/ema/" in name} == {parameter}
    assert "fsdp" in parameter
    factored = [spec for name, spec in moments.items() if "/v_row/" in name or "/v_col/" in name]
    assert factored
    assert not any(any(spec) for spec in factored)


def test_a_step_with_randomness(compiled, batches, one_device):
    """Runs repeat to the bit, dropout differs between steps, and ema_params is the average."""
    new_state, step = compiled
    values, states = take_steps(new_state, step, batches, one_device)
    again, others = take_steps(new_state, step, batches, one_device)
    assert values == again
    jax.tree.map(np.testing.assert_array_equal, states, others)

    losses = set()
    for number in range(3):  # the loss before the update: only the dropout masks can change it
        state = new_state()
        state = state.replace(step=jax.device_put(np.int32(number), state.step.sharding))
        (batch,) = feeding.to_devices(batches[:1], one_device)
        losses.add(float(step(state, batch)[1]["loss"]))
    assert len(losses) == 3

    average = jax.device_get(new_state().params)
    for state in states:
        average = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, average, state.params)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.ema_params, average
        )
        assert state.eval_params is state.ema_params


EVERYTHING = DROP | dict(remat="full", scan=True)


@pytest.mark.parametrize(
    ("axes", "fields"),
    [
        (dict(data=2, fsdp=2, tensor=2), EVERYTHING),
        slow(dict(data=4, fsdp=2, slices=2), EVERYTHING),
        slow(dict(data=8), EVERYTHING),
        slow(dict(fsdp=8), EVERYTHING),
        slow(dict(data=2, fsdp=4), EVERYTHING),
        slow(dict(tensor=4), EVERYTHING),
        slow(dict(data=2, fsdp=2, tensor=2), DROP),
    ],
)
def test_every_mesh_computes_what_one_device_does(
    config, batches, one_device, one_device_runs, axes, fields
):
    """All randomness is on, with an average, rematerialization and accumulation."""
    config.accum_steps = 2
    config.augment.mixup_alpha = 0.5
    config.optimizer.update(name="sgd", momentum_dtype="float32")  # Adam amplifies rounding
    config.schedule.base_lr = 0.1
    size = int(np.prod([axes.get(name, 1) for name in meshes.AXES]))
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
    """Caches the losses and the final state of one device."""
    return {}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lamb", "muon"])
def test_norms_of_whole_matrices_on_any_mesh(name, config, batches, one_device):
    """LAMB's trust ratios and Muon's iterations are of kernels that FSDP and tensor split."""
    config.optimizer.update(name=name, eps=1e-4)  # Adam's direction doesn't amplify rounding then
    mesh = meshes.create_mesh(data=2, fsdp=2, tensor=2)
    expected, reference = run(config, batches, one_device, scan=True)
    values, state = run(config, batches, mesh, scan=True)
    np.testing.assert_allclose(values, expected, rtol=1e-3)
    assert_close(*map(without_key_biases, (state, reference)), rtol=1e-2, atol=1e-3)


def test_no_device_ever_holds_more_than_its_shards_of_a_new_model(config):
    """Neither the result nor the temporaries exceed the device's share."""
    mesh = meshes.create_mesh(data=1, fsdp=8)
    model = tiny_model(width=256, mlp_dim=1024)
    params = jax.eval_shape(lambda: train_state.init_params(model, IMAGE, 0))
    tx, _ = optim.create(config, params, 10)
    make_state, shapes = train_state.initializer(model, tx, IMAGE, config, mesh)
    memory = make_state.lower().compile().memory_analysis()
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    assert memory.output_size_in_bytes < whole / 7
    assert memory.temp_size_in_bytes < whole / 7


def test_accumulation_computes_what_the_whole_batch_does(config, batches, one_device):
    config.optimizer.update(name="sgd", momentum_dtype="float32")
    expected, whole = run(config, batches, one_device)
    config.accum_steps = 4
    values, parts = run(config, batches, one_device)
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    assert_close(parts, whole)


@pytest.mark.parametrize(
    ("axes", "fields"),
    [(dict(), {}), slow(dict(data=2, fsdp=2, tensor=2), EVERYTHING)],
)
def test_frozen_parameters_get_no_gradient(config, batches, axes, fields, one_device, monkeypatch):
    """The state is that of all gradients, at the cost of a forward pass; the norm is the head's."""
    config.optimizer.update(name="sgd", momentum=0.0, weight_decay=0.0, frozen=("(?!head)",))
    config.schedule.update(name="constant", base_lr=0.1)
    config.update(grad_clip_norm=0.0, accum_steps=2)
    mesh = meshes.create_mesh(**{"data": 1, **axes}) if axes else one_device
    new_state, step = compile_step(config, mesh, **fields)
    _, states = take_steps(new_state, step, batches, mesh)

    (batch,) = feeding.to_devices(batches[:1], mesh)
    _, values = step(new_state(), batch)
    moved = jax.tree.map(np.subtract, states[0].params, jax.device_get(new_state().params))
    assert float(optax.tree.norm(moved)) == pytest.approx(0.1 * float(values["grad_norm"]), 1e-3)

    def split_nothing(params, _):
        return params, jax.tree.map(lambda _: None, params)

    monkeypatch.setattr(optim, "split_frozen", split_nothing)
    new_state, full_step = compile_step(config, mesh, **fields)
    _, expected = take_steps(new_state, full_step, batches, mesh)
    assert_close(states[-1], expected[-1], atol=1e-6)
    assert step.cost_analysis()["flops"] < 0.5 * full_step.cost_analysis()["flops"]


@pytest.mark.slow
def test_accumulation_saves_memory(config, one_device):
    """Images become float32 one microbatch at a time."""
    image = (128, 128, 3)
    model = tiny_model(patch_size=32, depth=1)
    temporaries = []
    for config.accum_steps in (1, 16):
        params = jax.eval_shape(lambda: train_state.init_params(model, image, 0))
        tx, rate = optim.create(config, params, 10)
        _, shapes = train_state.initializer(model, tx, image, config, one_device)
        step = steps.make_train_step(model, tx, rate, config)
        batch = sharding.batch_shapes(256, image, one_device)
        step = sharding.compile_train_step(step, shapes, batch)
        temporaries.append(step.memory_analysis().temp_size_in_bytes)
    float32_batch = 256 * 4 * 128 * 128 * 3
    assert temporaries[1] < 0.75 * float32_batch < temporaries[0]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", slow("sgd")])
def test_updates_that_are_not_finite_are_dropped(
    config, batches, one_device, optimizer, monkeypatch
):
    """The result is as if the batch were left out, but the step and the schedule count it."""

    def poisoned(logits, targets):  # NaN if all labels are 9
        return losses.softmax_cross_entropy(logits, targets) + jnp.log(
            jnp.where(targets[:, 9].min() > 0.5, -1, 1)
        )

    monkeypatch.setattr(losses, "create", lambda *_: losses.Loss(poisoned, None))
    config.on_nonfinite = "skip"
    config.optimizer.name = optimizer
    config.schedule.name = "constant"
    bad = {"images": batches[1]["images"], "labels": np.full(16, 9, np.int32)}
    new_state, step = compile_step(config, one_device)
    values, (*_, state) = take_steps(new_state, step, [batches[0], bad, batches[2]], one_device)
    expected, (*_, without) = take_steps(new_state, step, [batches[0], batches[2]], one_device)
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
    params = jax.eval_shape(lambda: train_state.init_params(model, IMAGE, 0))
    tx, _ = optim.create(config, params, 10)
    _, state = train_state.initializer(model, tx, IMAGE, config, mesh)
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


def test_the_layer_axis_of_stacked_blocks_stays_whole():
    mesh = meshes.create_mesh(data=1, fsdp=8)
    name = "params/Transformer/encoderblock/MlpBlock_0/Dense_0/"
    assert "fsdp" not in sharding.partition(f"{name}bias", (8, 64), mesh)
    assert sharding.partition(f"{name}kernel", (64, 16, 32), mesh)[0] is None
    assert "fsdp" in sharding.partition(f"{name}kernel", (64, 16, 32), mesh)
