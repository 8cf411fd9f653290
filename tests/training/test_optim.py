"""Update rules, clipping, decay, and learning rates per parameter."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import randomized, tiny_model

from vit_jax.errors import UserError
from vit_jax.paths import stack_blocks, unstack_blocks
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
        (
            "lamb",
            lambda mask: optax.chain(
                optax.scale_by_adam(),
                optax.add_decayed_weights(0.3, mask),
                optax.masked(
                    optax.scale_by_trust_ratio(), lambda tree: {**mask(tree), "head": False}
                ),
                optax.scale(-0.1),
            ),
        ),
        ("lion", lambda mask: optax.lion(0.1, b2=0.999, weight_decay=0.3, mask=mask)),
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


@pytest.fixture(scope="module")
def wide_params():
    """Kernels that are factored: an MLP's (64, 96), and attention's (64, 2, 32), for each head."""
    model = tiny_model(width=64, mlp_dim=96, num_heads=2, depth=3)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3))))
    return randomized(shapes["params"])


def trajectory(tx, params, steps):
    """The parameters after updates with random gradients, each on another scale."""
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(steps):
        grads = jax.tree.map(lambda leaf, step=step: leaf * 2.0**step, randomized(params, step))
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.slow
@pytest.mark.parametrize(("rate", "mu_dtype"), [(0.1, "float32"), (1.0, "bfloat16")])
def test_adafactor_is_optaxs(rate, mu_dtype, tiny_config, wide_params):
    """optax rounds the moment after the learning rate, and leaves the rate out of the decay.

    The bound on b2 has no effect on the first 5,000 steps.
    """
    config = constant(tiny_config, name="adafactor", weight_decay=0.3, mu_dtype=mu_dtype)
    config.schedule.base_lr = rate
    ours, state = trajectory(optim.create(config, wide_params, 100)[0], wide_params, 12)
    reference = optax.adafactor(
        rate,
        min_dim_size_to_factor=32,
        multiply_by_parameter_scale=False,
        clipping_threshold=None,
        momentum=0.9,
        dtype_momentum=mu_dtype,
        weight_decay_rate=rate * 0.3,
        weight_decay_mask=optim.is_kernel,
    )
    theirs, _ = trajectory(reference, wide_params, 12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), ours, theirs)
    moments = optax.tree.get(state, "ema")
    assert {leaf.dtype for leaf in jax.tree.leaves(moments)} == {jnp.dtype(mu_dtype)}
    stored = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    weights = sum(leaf.size for leaf in jax.tree.leaves(wide_params))
    assert stored < weights * (jnp.dtype(mu_dtype).itemsize + 1)


def test_adafactor_caps_the_decay_of_the_second_moment(tiny_config):
    """Of a vector, which isn't factored: v decays at 1 - t ** -decay_rate, at most b2."""
    config = constant(tiny_config, name="adafactor", b1=0.0, b2=0.6, weight_decay=0.0)
    tx, _ = optim.create(config, {"bias": np.zeros(1)}, 100)
    params, state, v = {"bias": np.float32([0.0])}, tx.init({"bias": np.float32([0.0])}), 0.0
    for t, grad in enumerate([1.0, 3.0, 0.5, 2.0, 1.0], start=1):
        updates, state = tx.update({"bias": np.float32([grad])}, state, params)
        decay = min(0.6, 1 - t**-0.8)
        v = decay * v + (1 - decay) * grad**2
        assert float(updates["bias"][0]) == pytest.approx(-0.1 * grad / v**0.5, rel=1e-5)


@pytest.mark.slow
def test_muon_is_optaxs(tiny_config, params):
    """For the kernels of blocks, as matrices of two axes; other parameters are AdamW's."""
    fields = dict(momentum=0.95, momentum_dtype="float32", mu_dtype="float32", weight_decay=0.3)
    grads = randomized(params, seed=1)
    ours, _ = one_update(constant(tiny_config, name="muon", **fields), params, grads, steps=3)
    adamw, _ = one_update(constant(tiny_config, name="adamw", **fields), params, grads, steps=3)
    tx = optax.contrib.muon(0.1, weight_decay=0.3, consistent_rms=0.2)
    for (path, leaf), new, start, grad, other in zip(
        jax.tree.leaves_with_path(ours),
        *map(jax.tree.leaves, (ours, params, grads, adamw)),
        strict=True,
    ):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if "encoderblock_" in name and name.endswith("kernel"):
            rows = 32 if not name.endswith("Dense_1/kernel") else 64
            matrix, grad = (np.reshape(array, (rows, -1)) for array in (start, grad))
            state = tx.init(matrix)
            for _ in range(3):
                updates, state = jax.jit(tx.update)(grad, state, matrix)
                matrix = optax.apply_updates(matrix, updates)
            other = np.reshape(matrix, leaf.shape)
        np.testing.assert_allclose(new, other, rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    "name", ["lamb", *(pytest.param(n, marks=pytest.mark.slow) for n in ("adafactor", "muon"))]
)
def test_stacked_blocks_are_updated_layer_by_layer(name, tiny_config, wide_params):
    config = constant(tiny_config, name=name, min_dim_size_to_factor=2, mu_dtype="float32")
    config.optimizer.momentum_dtype = "float32"
    plain, _ = trajectory(optim.create(config, wide_params, 100)[0], wide_params, 4)
    stacked, state = stack_blocks(wide_params), None
    grads = [
        stack_blocks(jax.tree.map(lambda leaf, s=s: leaf * 2.0**s, randomized(wide_params, s)))
        for s in range(4)
    ]
    tx, _ = optim.create(config, stacked, 100)
    state, update = tx.init(stacked), jax.jit(tx.update)
    for step_grads in grads:
        updates, state = update(step_grads, state, stacked)
        stacked = optax.apply_updates(stacked, updates)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        unstack_blocks(stacked),
        plain,
    )


@pytest.mark.parametrize("name", ["adamw", "sgd", "adafactor"])
def test_weight_decay_by_pattern(name, tiny_config, params):
    """Without gradients only decay is left: of the head's kernel 100 times as much."""
    config = constant(tiny_config, name=name, weight_decay=0.03, momentum=0.0)
    config.optimizer.weight_decay_multipliers = (("head", 100.0), (".*MlpBlock_0", 0.0))
    updated, _ = one_update(config, params, jax.tree.map(jnp.zeros_like, params))
    rates = jax.tree.map(lambda a, b: float(np.mean(1 - a / b)), updated, params)
    assert rates["head"]["kernel"] == pytest.approx(0.1 * 3.0, rel=1e-3)
    assert rates["head"]["bias"] == 0
    assert rates["embedding"]["kernel"] == pytest.approx(0.1 * 0.03, rel=1e-3)
    assert rates["Transformer"]["encoderblock_1"]["MlpBlock_0"]["Dense_0"]["kernel"] == 0


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


@pytest.mark.slow
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
        ({"optimizer.name": "adamax"}, "optimizer.name is 'adamax'.*'adamw'"),
        ({"optimizer.frozen": ("hed",)}, "'hed' matches no parameter"),
        ({"optimizer.frozen": (".",)}, "freezes every parameter"),
        ({"optimizer.frozen": ("*",)}, r"'\*' is not a regular expression"),
        ({"optimizer.lr_multipliers": ("head", 10.0)}, "it must be pairs"),
        ({"optimizer.mu_dtype": "bfloat17"}, "mu_dtype is 'bfloat17'"),
        ({"optimizer.lr_multipliers": (("hed", 1.0),)}, "lr_multipliers: 'hed' matches no param"),
        (
            {"optimizer.weight_decay_multipliers": (("hed", 1.0),)},
            "_decay_multipliers: 'hed' match",
        ),
        (
            {"optimizer.weight_decay_multipliers": ("head",)},
            "weight_decay_multipliers is .*; it must",
        ),
        ({"optimizer.decay_rate": 0.0}, "decay_rate is 0.0; it must be a number > 0"),
        ({"optimizer.min_dim_size_to_factor": 0}, "to_factor is 0; it must be a whole number >= 1"),
    ],
)
def test_mistakes_are_named(change, message, tiny_config, params):
    tiny_config.update_from_flattened_dict(change)
    with pytest.raises(UserError, match=message):
        optim.create(tiny_config, params, 10)


def test_variables_in_place_of_parameters(tiny_config, params):
    """Layer decay would leave out the layers that it doesn't find."""
    with pytest.raises(UserError, match=r"the tree of parameters: variables\['params'\]"):
        optim.create(tiny_config, {"params": params}, 10)
