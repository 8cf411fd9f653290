"""Fields of today's Vision Transformers: what each computes, alone and with the others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import apply, init, tiny_model
from published import random_params

from vit_jax import pretrained
from vit_jax.errors import UserError
from vit_jax.models import posemb
from vit_jax.models.layers import draw_patches
from vit_jax.models.vit import EncoderBlock
from vit_jax.parallel import sharding
from vit_jax.parallel.mesh import create_mesh
from vit_jax.paths import stack_blocks, unstack_blocks
from vit_jax.pretrained.weights import Weights
from vit_jax.scaling.flops import forward_flops, training_flops

# Every field at once, as far as they go together.
ALL = dict(
    pool="cls_gap",
    reg_tokens=2,
    no_embed_class=True,
    rope="mixed",
    pre_norm=True,
    norm_layer="rmsnorm",
    qkv_bias=False,
    qk_norm=True,
    init_values=0.5,
    mlp_layer="swiglu",
    scale_mlp=True,
)
COMBINATIONS = {
    "all": ALL,
    "eva02": dict(rope="axial", rope_grid=(7, 7), mlp_layer="swiglu", scale_mlp=True, pool="gap")
    | dict(pool_norm="after", class_token=True),
    "dinov3": dict(rope="axial", rope_grid="centered", posemb="none", reg_tokens=3, qkv_bias=False),
    "map": dict(pool="map", class_token=True, reg_tokens=1, embed_reg=True, qk_norm=True),
    "post": dict(norm="post", norm_layer="rmsnorm", init_values=0.1, gelu="quick", rope="axial"),
}
# The others take as long, and differ less.
NAMES = [
    name if name in ("all", "eva02") else pytest.param(name, marks=pytest.mark.slow)
    for name in COMBINATIONS
]


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(7), (4, 32, 32, 3))


def layer_norm(x, p, eps=1e-6):
    normalized = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
    return normalized * p["scale"] + p["bias"]


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def dense(x, p):
    return x @ p["kernel"] + p["bias"]


BLOCK = dict(
    num_heads=2, mlp_dim=12, norm="pre", norm_layer="layernorm", gelu="quick", mlp_layer="mlp"
)
BLOCK |= dict(scale_mlp=False, qkv_bias=True, qk_norm=False, init_values=None, rope="none")
BLOCK |= dict(rope_temperature=100.0, layer_norm_eps=1e-6, dropout_rate=0.0)
BLOCK |= dict(attention_dropout_rate=0.0, attention_impl="auto", dtype=jnp.float32)


def run_block(coords=None, **fields):
    """Applies a block of width 16 with random parameters; returns them, its input and output."""
    block = EncoderBlock(**{**BLOCK, **fields})
    x = np.random.default_rng(0).normal(size=(2, 6, 16)).astype(np.float32)
    shapes = jax.eval_shape(lambda: block.init(jax.random.key(0), x, None, coords, None, None))
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda s: rng.normal(0, 0.5, s.shape).astype("float32"), shapes["params"])
    y, _ = block.apply({"params": params}, x, None, coords, None, None)
    return params, x, np.asarray(y)


def attend(z, p, norm=lambda x, name: x):
    """The attention of a block; `norm` is applied to queries and keys."""

    def project(name):  # (N, H, L, d)
        return np.einsum("nld,dhe->nhle", z, p[name]["kernel"]) + p[name]["bias"][:, None]

    query, key = norm(project("query"), "query_ln"), norm(project("key"), "key_ln")
    weights = softmax(query @ key.swapaxes(2, 3) / np.sqrt(8))
    out = np.einsum("nhle,hed->nld", weights @ project("value"), p["out"]["kernel"])
    return out + p["out"]["bias"]


def test_a_block_with_qk_norm_and_layer_scale_follows_its_formula():
    p, x, y = run_block(qk_norm=True, init_values=1.0)
    a = p["MultiHeadDotProductAttention_0"]
    out = attend(layer_norm(x, p["LayerNorm_0"]), a, lambda x, name: layer_norm(x, a[name]))
    x = x + out * p["LayerScale_0"]["gamma"]
    hidden = dense(layer_norm(x, p["LayerNorm_1"]), p["MlpBlock_0"]["Dense_0"])
    hidden /= 1 + np.exp(-1.702 * hidden)  # quick GELU
    x = x + dense(hidden, p["MlpBlock_0"]["Dense_1"]) * p["LayerScale_1"]["gamma"]
    np.testing.assert_allclose(y, x, rtol=1e-4, atol=1e-4)


def test_swiglu_with_a_norm_of_the_hidden_layer_follows_its_formula():
    p, x, y = run_block(mlp_layer="swiglu", scale_mlp=True)
    mlp = p["MlpBlock_0"]
    x = x + attend(layer_norm(x, p["LayerNorm_0"]), p["MultiHeadDotProductAttention_0"])
    inputs = layer_norm(x, p["LayerNorm_1"])
    gate = dense(inputs, mlp["gate"])
    hidden = gate / (1 + np.exp(-gate)) * dense(inputs, mlp["Dense_0"])
    x = x + dense(layer_norm(hidden, mlp["LayerNorm_0"]), mlp["Dense_1"])
    np.testing.assert_allclose(y, x, rtol=1e-4, atol=1e-4)


def test_rms_norms_do_not_subtract_the_mean():
    p, x, _ = run_block(norm_layer="rmsnorm")
    assert set(p["LayerNorm_0"]) == {"scale"}
    shifted = run_block(norm_layer="rmsnorm", norm="post")[2]
    p = run_block(norm_layer="rmsnorm", norm="post")[0]["LayerNorm_1"]["scale"]
    np.testing.assert_allclose(np.sqrt(np.mean((shifted / p) ** 2, -1)), 1.0, rtol=1e-3)
    assert np.abs((shifted / p).mean(-1)).max() > 1e-2


@pytest.mark.parametrize("rope", ["axial", "mixed"])
def test_rotary_scores_depend_on_differences_of_coordinates(rope):
    """Moving all patches by the same rows and columns changes nothing; moving one does."""
    coords = np.random.default_rng(2).integers(0, 9, (1, 6, 2)).astype(np.float32)
    fields = dict(rope=rope, rope_temperature=10.0)
    _, _, y = run_block(coords, **fields)
    _, _, moved = run_block(coords + np.float32([3, -5]), **fields)
    np.testing.assert_allclose(moved, y, rtol=2e-4, atol=2e-4)
    coords[0, 2, 1] += 1
    assert np.abs(run_block(coords, **fields)[2] - y).max() > 1e-3


def test_axial_rotations_are_those_of_complex_numbers():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 6, 2 * 8)).astype(np.float32)
    coords = posemb.coordinates(2, 3, "index")
    frequencies = posemb.axial_frequencies(8, 100.0)
    angles = coords[..., :1, None] * frequencies[0] + coords[..., 1:, None] * frequencies[1]
    turned = np.asarray(posemb.rotate(x, angles)).reshape(6, 2, 2, 4)
    pairs = x.reshape(6, 2, 2, 4)
    rows, columns = np.divmod(np.arange(6), 3)
    bands = np.array([1.0, 0.1])  # 100 ** -(0, 1 / 2)
    theta = np.concatenate([rows[:, None] * bands, columns[:, None] * bands], axis=1)
    expected = (pairs[:, :, 0] + 1j * pairs[:, :, 1]) * np.exp(1j * theta)[:, None]
    np.testing.assert_allclose(turned[:, :, 0], expected.real, atol=1e-5)
    np.testing.assert_allclose(turned[:, :, 1], expected.imag, atol=1e-5)


def test_what_rotary_positions_count():
    index = posemb.coordinates(4, 2, "index")
    np.testing.assert_allclose(index[0, -1], [3, 1])
    np.testing.assert_allclose(posemb.coordinates(4, 2, (8, 8))[0, -1], [6, 4])
    np.testing.assert_allclose(
        posemb.coordinates(4, 2, "centered")[0, -1], 2 * np.pi * np.array([0.75, 0.5]), rtol=1e-6
    )


def test_tokens_before_the_patches(images):
    """Registers, a class token that isn't pooled, and which of them have positions."""

    def shapes(**fields):
        model = tiny_model(**fields)
        params = jax.eval_shape(lambda: model.init(jax.random.key(0), images))["params"]
        return params, params["Transformer"]["posembed_input"]["pos_embedding"].shape[1]

    assert shapes()[1] == 17
    assert shapes(no_embed_class=True)[1] == 16
    assert shapes(reg_tokens=3)[1] == 17
    assert shapes(reg_tokens=3, embed_reg=True)[1] == 20
    params, length = shapes(pool="gap", class_token=True, reg_tokens=3)
    assert (params["cls"].shape, params["reg_tokens"].shape, length) == ((1, 1, 32), (1, 3, 32), 17)

    model = tiny_model(pool="cls_gap", reg_tokens=3, depth=1)
    variables = init(model, images)
    logits, captured = apply(model, variables, images, capture=("tokens",))
    tokens, head = captured["tokens"], variables["params"]["head"]
    pooled = np.concatenate([tokens[:, 0], tokens[:, 4:].mean(1)], axis=-1)
    np.testing.assert_allclose(dense(pooled, head), logits, atol=1e-4)


def test_registers_without_positions_stay_between_the_class_token_and_the_patches(images):
    """A position for each token that is zero for the registers gives the same."""
    some, every = (tiny_model(reg_tokens=2, embed_reg=embed) for embed in (False, True))
    variables = init(some, images)
    table = variables["params"]["Transformer"]["posembed_input"]["pos_embedding"]
    full = np.concatenate([table[:, :1], np.zeros((1, 2, 32)), table[:, 1:]], axis=1)
    transformer = variables["params"]["Transformer"] | {"posembed_input": {"pos_embedding": full}}
    params = variables["params"] | {"Transformer": transformer}
    expected = apply(some, variables, images)
    np.testing.assert_allclose(apply(every, {"params": params}, images), expected, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_patches_that_are_left_out_might_as_well_be_masked(name, images):
    """`keep` computes with fewer tokens what a mask of the others computes."""
    model = tiny_model(**COMBINATIONS[name])
    variables = init(model, images)
    keep = jnp.array([[0, 3, 5, 11], [1, 2, 3, 4], [12, 13, 14, 15], [2, 7, 8, 9]])
    mask = jnp.zeros((4, 16), bool).at[jnp.arange(4)[:, None], keep].set(True)
    logits, captured = apply(model, variables, images, keep=keep, capture=("tokens",))
    assert captured["tokens"].shape[1] == model.num_prefix_tokens + 4
    expected = apply(model, variables, images, mask=mask)
    np.testing.assert_allclose(logits, expected, atol=2e-5, rtol=2e-5)
    assert np.abs(apply(model, variables, images) - expected).max() > 1e-3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(keep=np.full((4, 3), 16)), r"keep has the index 16; those of the 16 patches are 0 "),
        (dict(keep=np.array([[5, -1]] * 4)), "keep has the index -1; those of the 16 patches are "),
        (dict(keep=np.arange(4)), r"keep is int64 \(4,\); it must be integers \(N, K\), with N 4"),
        (dict(keep=np.zeros((3, 2), int)), r"keep is int64 \(3, 2\); .* with N 4 and K from 1 to"),
        (dict(keep=np.zeros((4, 17), int)), r"keep is int64 \(4, 17\); .* K from 1 to 16, the num"),
        (dict(keep=np.zeros((4, 0), int)), r"keep is int64 \(4, 0\)"),
        (dict(keep=np.zeros((4, 2))), r"keep is float64 \(4, 2\); it must be integers"),
        (dict(mask=np.ones((4, 17), bool)), r"mask is bool \(4, 17\); it must be bool \(4, 16\)"),
        (dict(mask=np.ones(16, bool)), r"mask is bool \(16,\); it must be bool \(4, 16\)"),
        (dict(mask=np.ones((4, 16))), r"mask is float64 \(4, 16\); it must be bool"),
    ],
)
def test_masks_and_indices_of_no_patch_are_named(given, message, images):
    model = tiny_model(reg_tokens=1)
    params = random_params(model)
    with pytest.raises(UserError, match=message) as raised:
        model.apply({"params": params}, images, **given)
    assert "\n" not in str(raised.value)
    if "index" not in message:  # what shapes show is also found while JAX traces
        with pytest.raises(UserError):
            jax.eval_shape(
                lambda given: model.apply({"params": params}, images, **given),
                given,
            )


def test_patch_dropout_leaves_out_a_share_drawn_for_each_image(images):
    kept = np.asarray(draw_patches(jax.random.key(0), 1000, 16, 0.75))
    assert kept.shape == (1000, 12)
    assert (np.diff(kept, axis=1) > 0).all()  # each at most once, in row order
    np.testing.assert_allclose(np.bincount(kept.ravel()) / 1000, 0.75, atol=0.06)
    model = tiny_model(patch_drop_rate=0.75, pool="gap", depth=1)
    variables, rngs = init(model, images), {"dropout": jax.random.key(1)}
    _, captured = apply(model, variables, images, train=True, rngs=rngs, capture=("tokens",))
    assert captured["tokens"].shape == (4, 4, 32)
    _, captured = apply(model, variables, images, capture=("tokens",))
    assert captured["tokens"].shape == (4, 16, 32)


def loss_and_grads(model, params, images):
    def loss(params):
        rngs = {"dropout": jax.random.key(3)}
        return jnp.mean(model.apply({"params": params}, images, train=True, rngs=rngs) ** 2)

    return jax.value_and_grad(loss)(params)


@pytest.fixture(scope="module")
def plain(images):
    """A model with every field, dropping patches and branches, on one device."""
    model = tiny_model(**ALL, patch_drop_rate=0.5, stochastic_depth_rate=0.2)
    params = random_params(model)
    run = jax.jit(lambda params, images: loss_and_grads(model, params, images))
    return model, params, *run(params, images)


def assert_close(grads, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4), grads, expected
    )


@pytest.mark.slow
def test_all_fields_with_scan_and_remat(plain, images):
    model, params, value, grads = plain
    stacked = model.clone(scan=True, remat="full")
    run = jax.jit(lambda params, images: loss_and_grads(stacked, params, images))
    other, other_grads = run(stack_blocks(params), images)
    np.testing.assert_allclose(other, value, rtol=1e-5)
    assert_close(unstack_blocks(other_grads), grads)


def test_all_fields_with_fsdp_and_tensor_parallelism(plain, images):
    model, params, value, grads = plain
    mesh = create_mesh(data=2, fsdp=2, tensor=2)
    shardings = sharding.state_sharding(params, mesh)
    gate = shardings["Transformer"]["encoderblock_0"]["MlpBlock_0"]["gate"]["kernel"]
    assert "tensor" in gate.spec
    run = sharding.with_mesh(lambda *args: loss_and_grads(model, *args), mesh)
    sharded = jax.device_put(images, sharding.batch_sharding(mesh))
    other, other_grads = jax.jit(run)(jax.device_put(params, shardings), sharded)
    np.testing.assert_allclose(other, value, rtol=1e-5)
    assert_close(other_grads, grads)


@pytest.mark.parametrize("name", NAMES)
def test_captures_attention_growth_and_resolution(name, images):
    """The plain attention of captures agrees, and so does bfloat16.

    Deeper models for larger images start from the parameters.
    """
    fields = COMBINATIONS[name]
    model = tiny_model(**fields)
    variables = init(model, images)
    logits, captured = apply(model, variables, images, capture=("attention", "blocks"))
    np.testing.assert_allclose(logits, apply(model, variables, images), atol=2e-5, rtol=2e-5)
    assert captured["attention"].shape[-1] == model.num_tokens((32, 32))
    half = apply(model.clone(dtype=jnp.bfloat16), variables, images)
    np.testing.assert_allclose(half, logits, atol=0.03)
    flat = {
        "/".join(key.key for key in path): np.asarray(leaf)
        for path, leaf in jax.tree.leaves_with_path(variables["params"])
    }
    stored = Weights(path="w", params=flat, prefix_rows=(model.num_prefix_positions,))
    deeper = tiny_model(**fields, depth=4, scan=True)
    params = pretrained.load(stored, deeper, (48, 40), depth="stack")
    large = jax.random.normal(jax.random.key(0), (1, 48, 40, 3))
    assert np.isfinite(apply(deeper, {"params": params}, large)).all()


def test_flops_of_a_swiglu_and_of_both_pools():
    plain, gated = (tiny_model(mlp_layer=layer) for layer in ("mlp", "swiglu"))
    added = forward_flops(gated, (32, 32, 3)) - forward_flops(plain, (32, 32, 3))
    assert added == 2 * 2 * 17 * 32 * 64
    both = tiny_model(pool="cls_gap")
    added = forward_flops(both, (32, 32, 3)) - forward_flops(plain, (32, 32, 3))
    assert added == 2 * 32 * 10
    dropped = tiny_model(patch_drop_rate=0.75)
    assert forward_flops(dropped, (32, 32, 3)) == forward_flops(plain, (32, 32, 3))
    saved = training_flops(plain, (32, 32, 3)) - training_flops(dropped, (32, 32, 3))
    per_token = 2 * (4 * 32 * 32 + 2 * 32 * 64)  # projections and MLP of a block
    pairs = 2 * 2 * 32 * (17**2 - 5**2)  # scores and weighted sums
    assert saved == 3 * 2 * (12 * per_token + pairs)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(class_token=False), "class_token is False, but model.pool 'cls' needs one"),
        (dict(reg_tokens=-1), "model.reg_tokens is -1; it must be a whole number >= 0"),
        (dict(no_embed_class=True, posemb="none"), "no_embed_class needs model.posemb 'learned'"),
        (dict(embed_reg=True), "model.embed_reg, .*, needs model.reg_tokens > 0"),
        (dict(rope="2d"), "model.rope is '2d'; it must be 'none', 'axial' or 'mixed'"),
        (dict(rope="axial", num_heads=16), "needs heads whose width is a multiple of 4, not 2"),
        (dict(rope_grid="centered"), "rope_grid is 'centered', which needs model.rope 'axial' or"),
        (dict(rope="axial", rope_grid="pixels"), "rope_grid is 'pixels'; it must be 'index', 'cen"),
        (
            dict(rope="axial", rope_grid=(7,)),
            r"rope_grid is \(7,\); it must be 'index', 'centered'",
        ),
        (dict(norm_layer="batchnorm"), "norm_layer is 'batchnorm'; it must be 'layernorm' or 'rms"),
        (dict(mlp_layer="glu"), "model.mlp_layer is 'glu'; it must be 'mlp' or 'swiglu'"),
        (dict(init_values=-1.0), "model.init_values is -1.0"),
        (dict(patch_drop_rate=1.0), "model.patch_drop_rate is 1.0; it must be a number >= 0 and <"),
        (dict(pool="map", pool_norm="after"), "pool_norm 'after' needs model.pool 'cls' or 'gap'"),
        (dict(qkv_bias="no"), "model.qkv_bias is 'no'; it must be False or True"),
    ],
)
def test_fields_that_do_not_go_together_are_named(fields, message):
    with pytest.raises(UserError, match=message) as raised:
        tiny_model(**fields)
    assert "\n" not in str(raised.value)
