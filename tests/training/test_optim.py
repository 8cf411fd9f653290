import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import randomized, tiny_model

from vit_jax.errors import UserError
from vit_jax.models.stacking import stack_blocks, unstack_blocks
from vit_jax.training import optim


@pytest.fixture(scope="module")
def params():
    shapes = jax.eval_shape(
        lambda: tiny_model(depth=3).init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    )
    return randomized(shapes["params"])


def rates(config, steps=100):
    rate = optim.schedule(config.schedule, steps)
    return np.array([rate(step) for step in range(steps + 1)])


@pytest.mark.parametrize("name", ["cosine", "linear", "rsqrt", "constant", "step"])
def test_schedules(name, tiny_config):
    tiny_config.schedule.update(
        name=name, base_lr=2.0, warmup_steps=10, timescale=20, cooldown_steps=15, decay_steps=40
    )
    values = rates(tiny_config)
    np.testing.assert_allclose(values[:11], np.arange(11) * 0.2, rtol=1e-6)
    t = np.arange(10, 101)
    expected = {
        "cosine": 1 + np.cos(np.pi * (t - 10) / 90),
        "linear": 2.0 * (100 - t) / 90,
        "rsqrt": 2.0 / np.sqrt(1 + (t - 10) / 20) * np.minimum(1, (100 - t) / 15),
        "constant": np.full(91, 2.0),
        "step": 2.0 * 0.1 ** (t // 40),
    }[name]
    np.testing.assert_allclose(values[10:], expected, rtol=1e-5, atol=1e-6)


def test_schedules_end_where_they_are_told(tiny_config):
    for name in ("cosine", "linear"):
        tiny_config.schedule.update(name=name, end_lr=1e-4)
        assert rates(tiny_config)[-1] == pytest.approx(1e-4)


def one_update(config, params, grads, steps=1):
    tx, _ = optim.create(config, params, 10)
    state = tx.init(params)
    for _ in range(steps):
        updates, state = jax.jit(tx.update)(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def constant(config, **optimizer):
    config.schedule.update(name="constant", base_lr=0.1, warmup_steps=0)
    config.grad_clip_norm = 0.0
    config.optimizer.update(optimizer)
    return config


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("adamw", lambda mask: optax.adamw(0.1, weight_decay=0.3, mask=mask)),
        (
            "adam",
            lambda mask: optax.chain(optax.add_decayed_weights(0.3, mask), optax.adam(0.1)),
        ),
        (
            "sgd",
            lambda mask: optax.chain(optax.add_decayed_weights(0.3, mask), optax.sgd(0.1, 0.9)),
        ),
    ],
)
def test_update_rules(name, reference, tiny_config, params):
    config = constant(
        tiny_config, name=name, weight_decay=0.3, mu_dtype="float32", momentum_dtype="float32"
    )
    grads = randomized(params, seed=1)
    ours, _ = one_update(config, params, grads, steps=3)

    tx = reference(lambda tree: jax.tree.map_with_path(lambda p, _: p[-1].key == "kernel", tree))
    state, theirs = tx.init(params), params
    for _ in range(3):
        updates, state = tx.update(grads, state, theirs)
        theirs = optax.apply_updates(theirs, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), ours, theirs)


def test_moments_in_bfloat16(tiny_config, params):
    for name, field in (("adamw", "mu"), ("sgd", "trace")):
        _, state = one_update(constant(tiny_config, name=name), params, params)
        moments = optax.tree.get(state, field)
        assert {leaf.dtype for leaf in jax.tree.leaves(moments)} == {jnp.dtype("bfloat16")}


def test_clipping_by_the_global_norm(tiny_config, params):
    config = constant(tiny_config, name="sgd", momentum=0.0, weight_decay=0.0)
    config.grad_clip_norm = 0.5
    grads = jax.tree.map(lambda leaf: 100 * leaf, params)
    updated, _ = one_update(config, params, grads)
    moved = optax.tree.norm(jax.tree.map(jnp.subtract, updated, params))
    assert float(moved) == pytest.approx(0.1 * 0.5, rel=1e-3)


def test_frozen_parameters_stay_and_cost_nothing(tiny_config, params):
    """Only the head learns, and only the head has moments."""
    config = constant(tiny_config, name="adamw", weight_decay=0.5, frozen=("(?!head)",))
    updated, state = one_update(config, params, randomized(params, 1))
    for name in ("embedding", "Transformer", "cls"):
        jax.tree.map(np.testing.assert_array_equal, updated[name], params[name])
    for name in ("kernel", "bias"):
        assert not np.array_equal(updated["head"][name], params["head"][name])
    stored = sum(leaf.size for leaf in jax.tree.leaves(state))
    trained = sum(leaf.size for leaf in jax.tree.leaves(params["head"]))
    assert 2 * trained <= stored < 2 * trained + 10


def test_frozen_with_multipliers(tiny_config, params):
    config = constant(
        tiny_config, name="sgd", momentum=0.0, weight_decay=0.0, frozen=("embedding",)
    )
    config.optimizer.lr_multipliers = (("head", 10.0), ("cls|.*norm", 0.5))
    config.optimizer.layer_decay = 0.5
    grads = jax.tree.map(jnp.ones_like, params)
    updated, _ = one_update(config, params, grads)
    moved = jax.tree.map(lambda a, b: np.ptp(a - b) < 1e-5 and np.mean(b - a), updated, params)
    assert moved["head"]["kernel"] == pytest.approx(0.1 * 10, rel=1e-4)
    assert moved["cls"] == pytest.approx(0.1 * 0.5 * 0.5**4, rel=1e-4)
    assert moved["Transformer"]["encoder_norm"]["scale"] == pytest.approx(0.1 * 0.5, rel=1e-4)
    for i in range(3):
        block = moved["Transformer"][f"encoderblock_{i}"]["MlpBlock_0"]["Dense_0"]
        assert block["kernel"] == pytest.approx(0.1 * 0.5 ** (3 - i), rel=1e-4)
    np.testing.assert_array_equal(updated["embedding"]["kernel"], params["embedding"]["kernel"])
    # Patterns match from the beginning: the position embedding isn't the embedding.
    assert moved["Transformer"]["posembed_input"]["pos_embedding"] == pytest.approx(
        0.1 * 0.5**4, rel=1e-4
    )


def test_layer_decay_of_stacked_blocks(tiny_config, params):
    config = constant(tiny_config, name="sgd", weight_decay=0.1, layer_decay=0.7)
    grads = randomized(params, 1)
    plain, _ = one_update(config, params, grads)
    stacked, _ = one_update(config, stack_blocks(params), stack_blocks(grads))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
        unstack_blocks(stacked),
        plain,
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer.name": "lamb"}, "optimizer.name is 'lamb'.*'adamw'"),
        ({"schedule.name": "cosin"}, "schedule.name is 'cosin'.*'cosine'"),
        ({"schedule.warmup_steps": 10}, "warmup_steps 10 leaves nothing of the run's 10"),
        ({"schedule.name": "step"}, "decay_steps"),
        ({"optimizer.frozen": ("hed",)}, "'hed' matches no parameter"),
        ({"optimizer.frozen": (".",)}, "freezes every parameter"),
        ({"optimizer.frozen": ("*",)}, r"'\*' is no regular expression"),
        ({"optimizer.lr_multipliers": ("head", 10.0)}, "it takes pairs"),
        ({"optimizer.mu_dtype": "bfloat17"}, "mu_dtype is 'bfloat17'"),
        ({"optimizer.lr_multipliers": (("hed", 1.0),)}, "'hed' matches no parameter"),
    ],
)
def test_mistakes_are_named(change, message, tiny_config, params):
    tiny_config.update_from_flattened_dict(change)
    with pytest.raises(UserError, match=message):
        optim.create(tiny_config, params, 10)
