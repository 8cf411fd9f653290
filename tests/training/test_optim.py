"""Update rules, clipping, decay, and learning rates per parameter."""

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


def one_update(config, params, grads, steps=1):
    tx, _ = optim.create(config, params, 10)
    state = tx.init(params)
    update = jax.jit(tx.update)
    for _ in range(steps):
        updates, state = update(grads, state, params)
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
    state, theirs, update = tx.init(params), params, jax.jit(tx.update)
    for _ in range(3):
        updates, state = update(grads, state, theirs)
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
    moved = optax.tree.norm(jax.tree.map(np.subtract, updated, params))
    assert float(moved) == pytest.approx(0.1 * 0.5, rel=1e-3)


def test_frozen_parameters_have_no_state(tiny_config, params):
    """Only the head is updated, and only the head has moments."""
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
    # Patterns match the start of a name: pos_embedding isn't the embedding.
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
        ({"optimizer.frozen": ("hed",)}, "'hed' matches no parameter"),
        ({"optimizer.frozen": (".",)}, "freezes every parameter"),
        ({"optimizer.frozen": ("*",)}, r"'\*' is not a regular expression"),
        ({"optimizer.lr_multipliers": ("head", 10.0)}, "it must be pairs"),
        ({"optimizer.mu_dtype": "bfloat17"}, "mu_dtype is 'bfloat17'"),
        ({"optimizer.lr_multipliers": (("hed", 1.0),)}, "'hed' matches no parameter"),
    ],
)
def test_mistakes_are_named(change, message, tiny_config, params):
    tiny_config.update_from_flattened_dict(change)
    with pytest.raises(UserError, match=message):
        optim.create(tiny_config, params, 10)
