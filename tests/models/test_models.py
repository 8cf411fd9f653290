"""The model: sizes, the layouts of its blocks, masks, captures, randomness, mistakes."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import apply, init, tiny_model

from configs import common
from vit_jax import models, paths
from vit_jax.errors import UserError
from vit_jax.models.layers import GELUS, MlpBlock, drop_path
from vit_jax.paths import stack_blocks, unstack_blocks

# Google's counts, for 1,000 classes.
NUM_PARAMETERS = {
    "Ti/16": 5_717_416,
    "S/16": 22_050_664,
    "S/32": 22_878_952,
    "B/16": 86_567_656,
    "B/32": 88_224_232,
    "B/8": 86_576_872,
    "L/16": 304_326_632,
    "L/32": 306_535_400,
    "H/14": 632_045_800,
    "R+Ti/16": 6_337_704,
    "R26+S/32": 36_431_912,
    "R26+B/32": 101_383_976,
    "R50+B/16": 98_659_112,
    "R50+L/32": 328_994_856,
}


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(7), (3, 32, 32, 3))


@pytest.mark.parametrize("variant", NUM_PARAMETERS)
def test_published_sizes(variant):
    """The number of parameters is Google's, and every name is in the table of names."""
    model = models.create(variant, num_classes=1000, scan=True)  # traces one block
    images = jnp.zeros((1, 224, 224, 3))
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), images))["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == NUM_PARAMETERS[variant]
    assert all(paths.is_known(paths.path_name(p)) for p, _ in jax.tree.leaves_with_path(params))


def test_sizes_outside_the_table():
    assert models.create("B/14").patch_size == 14
    wide = models.create("B/16", width=1152)
    assert (wide.mlp_dim, wide.depth, wide.num_heads) == (4 * 1152, 12, 12)
    assert models.create("B/16", width=1152, mlp_dim=4304).mlp_dim == 4304
    assert models.create("g/14").mlp_dim == 6144
    assert models.create("S/16", representation_size=True).representation_size == 384


def test_every_model_field_can_be_configured():
    """All in config.model, except these, which are fields of config itself."""
    outside = {"num_classes", "dtype", "residual_dtype", "matmul_precision"}
    configured = set(common.get_config().model) - {"variant"}
    assert configured == set(models.FIELDS) - outside
    assert outside < set(common.get_config())
    defaults = {f: models.VisionTransformer.__dataclass_fields__[f].default for f in configured}
    for name, value in common.get_config().model.items():
        if value is not None and name != "variant":
            assert value == defaults[name], name


DROP = dict(dropout_rate=0.2, attention_dropout_rate=0.1, stochastic_depth_rate=0.3)


@functools.partial(jax.jit, static_argnums=2)
@jax.value_and_grad
def loss_and_grads(params, images, model):
    rngs = {"dropout": jax.random.key(3)}
    return jnp.sum(model.apply({"params": params}, images, train=True, rngs=rngs) ** 2)


@pytest.fixture(scope="module")
def plain(images):
    model = tiny_model(**DROP)
    params = init(model, images)["params"]
    return params, *loss_and_grads(params, images, model)


@pytest.mark.parametrize(
    ("scan", "remat"),
    [
        (True, "full"),
        pytest.param(False, "full", marks=pytest.mark.slow),
        pytest.param(True, "dots_and_attention", marks=pytest.mark.slow),
    ],
)
def test_scan_and_remat_do_not_change_results(images, plain, scan, remat):
    """Outputs and gradients are those of the plain loop, with all three kinds of dropout on."""
    params, expected, expected_grads = plain
    params = stack_blocks(params) if scan else params
    value, grads = loss_and_grads(params, images, tiny_model(scan=scan, remat=remat, **DROP))
    grads = unstack_blocks(grads) if scan else grads
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), grads, expected_grads
    )


def test_scan_initializes_each_layer_differently(images):
    params = jax.jit(tiny_model(scan=True).init)(jax.random.key(0), images)["params"]
    kernel = params["Transformer"]["encoderblock"]["MlpBlock_0"]["Dense_0"]["kernel"]
    assert not np.allclose(kernel[0], kernel[1])


@pytest.mark.parametrize(
    ("pool", "posemb"),
    [("gap", "sincos2d"), ("map", "none"), ("none", "none")],
)
def test_masked_padding_does_not_change_the_logits(pool, posemb):
    """Pads a 16x24 image on the right and below to 32x40."""
    model = tiny_model(pool=pool, posemb=posemb, depth=1)
    small = jax.random.normal(jax.random.key(0), (2, 16, 24, 3))
    variables = init(model, small)
    large = jnp.pad(small, ((0, 0), (0, 16), (0, 16), (0, 0)), constant_values=3.0)
    mask = np.zeros((2, 4, 5), bool)
    mask[:, :2, :3] = True
    expected = apply(model, variables, small)
    logits = apply(model, variables, large, mask=jnp.asarray(mask.reshape(2, 20)))
    if pool == "none":
        logits = logits.reshape(2, 4, 5, 10)[:, :2, :3].reshape(2, 6, 10)
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    if pool != "none":  # without the mask the padding changes them
        assert np.abs(apply(model, variables, large) - expected).max() > 1e-3


def test_masked_padding_with_learned_positions():
    model = tiny_model(pool="cls", depth=1)
    large = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
    variables = init(model, large)
    table = variables["params"]["Transformer"]["posembed_input"]["pos_embedding"]
    rows = np.concatenate(
        [table[:, :1], table[:, 1:].reshape(1, 4, 4, 32)[:, :2].reshape(1, 8, 32)], 1
    )
    small = jax.tree.map(lambda leaf: leaf, variables)
    small["params"]["Transformer"]["posembed_input"] = {"pos_embedding": rows}
    mask = jnp.arange(16)[None].repeat(2, 0) < 8
    np.testing.assert_allclose(
        apply(model, variables, large, mask=mask), apply(model, small, large[:, :16]), atol=1e-5
    )


@pytest.mark.parametrize(
    "fields",
    [{}, {"scan": True, "pool": "gap"}, {"norm": "post", "pool": "gap"}],
)
def test_captured_arrays(images, fields):
    """They have the documented shapes, don't change the logits, and reproduce them."""
    model = tiny_model(**fields)
    variables = init(model, images)
    captures = ("blocks", "attention", "tokens")
    logits, captured = apply(model, variables, images, capture=captures)
    np.testing.assert_allclose(logits, apply(model, variables, images), atol=1e-5)
    length = 16 if fields.get("pool") == "gap" else 17
    assert captured["blocks"].shape == (2, 3, length, 32)
    assert captured["attention"].shape == (2, 3, 4, length, length)
    np.testing.assert_allclose(captured["attention"].sum(-1), 1.0, rtol=1e-5)
    tokens, head = captured["tokens"], variables["params"]["head"]
    pooled = tokens.mean(axis=1) if fields.get("pool") == "gap" else tokens[:, 0]
    np.testing.assert_allclose(pooled @ head["kernel"] + head["bias"], logits, atol=1e-4)
    last = captured["blocks"][-1]
    if fields.get("norm") != "post":  # a post-norm encoder ends with its last block
        norm = variables["params"]["Transformer"]["encoder_norm"]
        deviation = np.sqrt(last.var(-1, keepdims=True) + 1e-6)
        last = (last - last.mean(-1, keepdims=True)) / deviation * norm["scale"] + norm["bias"]
    np.testing.assert_allclose(last, tokens, atol=1e-4)


def test_tokens_with_the_norm_after_pooling(images):
    model = tiny_model(pool="gap", pool_norm="after")
    variables = init(model, images)
    _, captured = apply(model, variables, images, capture=("blocks", "tokens"))
    np.testing.assert_array_equal(captured["tokens"], captured["blocks"][-1])


def test_post_norm_normalizes_each_residual_sum(images):
    model = tiny_model(norm="post", depth=1)
    variables = jax.jit(model.init)(jax.random.key(0), images)
    assert "encoder_norm" not in variables["params"]["Transformer"]
    _, captured = apply(model, variables, images, capture=("blocks",))
    np.testing.assert_allclose(captured["blocks"].mean(-1), 0.0, atol=1e-5)
    np.testing.assert_allclose(captured["blocks"].std(-1), 1.0, atol=1e-3)


def test_patches_and_images_that_are_not_square():
    model = tiny_model(patch_size=(4, 8), pool="gap")
    wide = jax.ShapeDtypeStruct((2, 16, 40, 5), jnp.float32)
    (logits, captured), _ = jax.eval_shape(
        lambda x: model.init_with_output(jax.random.key(0), x, capture=("blocks",)), wide
    )
    assert logits.shape == (2, 10)
    assert captured["blocks"].shape == (2, 2, 4 * 5, 32)


def test_a_new_head_returns_its_bias(images):
    init_with_output = jax.jit(tiny_model(head_bias_init=-6.9, depth=1).init_with_output)
    logits, _ = init_with_output(jax.random.key(0), images)
    np.testing.assert_array_equal(logits, np.full((3, 10), -6.9, np.float32))


def test_stochastic_depth_drops_whole_examples(images):
    """At rate 1 the last block is the identity for every example; the first is never dropped."""
    model = tiny_model(stochastic_depth_rate=0.999999)
    variables = init(model, images)
    train = dict(train=True, rngs={"dropout": jax.random.key(0)}, capture=("blocks",))
    _, dropped = apply(model, variables, images, **train)
    _, kept = apply(model, variables, images, capture=("blocks",))
    np.testing.assert_allclose(dropped["blocks"][0], kept["blocks"][0], atol=1e-5)
    np.testing.assert_allclose(dropped["blocks"][1], dropped["blocks"][0], atol=1e-5)


def test_stochastic_depth_of_the_same_rate_in_all_blocks(images):
    model = tiny_model(stochastic_depth_rate=0.999999, stochastic_depth_profile="constant")
    variables = init(model, images)
    train = dict(train=True, rngs={"dropout": jax.random.key(0)}, capture=("blocks",))
    _, dropped = apply(model, variables, images, **train)
    _, kept = apply(model, variables, images, capture=("blocks",))
    np.testing.assert_allclose(dropped["blocks"][1], dropped["blocks"][0], atol=1e-5)
    assert np.abs(dropped["blocks"][0] - kept["blocks"][0]).max() > 0.01


def test_stochastic_depth_keeps_the_mean():
    out = drop_path(jnp.ones((20_000, 1, 1)), jnp.float32(0.25), jax.random.key(0))
    assert set(np.unique(out)) <= {0.0, np.float32(1 / 0.75)}
    np.testing.assert_allclose(out.mean(), 1.0, atol=0.02)


# The activations' formulas, of NumPy arrays.
ACTIVATIONS = {
    "tanh": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "exact": lambda x: x * np.asarray(jax.scipy.stats.norm.cdf(x)),
    "quick": lambda x: x / (1 + np.exp(-1.702 * x)),
}


@pytest.mark.parametrize("gelu", GELUS)
def test_activations_follow_their_formulas(gelu):
    x = np.linspace(-3, 3, 12, dtype=np.float32).reshape(1, 3, 4)
    block = MlpBlock(mlp_dim=4, gelu=gelu)
    identity = {"kernel": jnp.eye(4), "bias": jnp.zeros(4)}
    out = block.apply({"params": {"Dense_0": identity, "Dense_1": identity}}, x)
    np.testing.assert_allclose(out, ACTIVATIONS[gelu](x), atol=1e-6)


def test_bfloat16_keeps_parameters_and_logits_in_float32(images):
    fields = dict(pool="map", representation_size=16, depth=1)
    model = tiny_model(dtype="bfloat16", **fields)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    variables = init(model, images)
    logits, captured = apply(model, variables, images, capture=("blocks",))
    assert logits.dtype == jnp.float32
    assert captured["blocks"].dtype == jnp.bfloat16
    full = apply(tiny_model(**fields), variables, images)
    np.testing.assert_allclose(logits, full, atol=0.1)


@pytest.mark.parametrize("scan", [True, False])
def test_the_residual_stream_may_be_float32(scan, images):
    fields = dict(pre_norm=True, scan=scan)
    model = tiny_model(dtype="bfloat16", residual_dtype="float32", **fields)
    variables = init(model, images)
    logits, captured = apply(model, variables, images, capture=("blocks",))
    assert captured["blocks"].dtype == jnp.float32
    full = apply(tiny_model(**fields), variables, images)
    np.testing.assert_allclose(logits, full, atol=0.1)


@pytest.mark.parametrize("precision", [None, "default", "high"])
def test_the_precision_of_float32_products(precision, images):
    """The head's product, the last, always has the highest."""
    model = tiny_model(matmul_precision=precision, depth=1)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images))
    text = jax.jit(model.apply).lower(shapes, images).as_text()
    found = re.findall(r"dot_general.*precision = \[(\w+), ", text)
    assert found[-1] == "HIGHEST"
    assert set(found[:-1]) == {(precision or "highest").upper()}


def stem(**fields):
    return lambda: tiny_model(resnet=fields)


def apply_to_others(model, image_shape):
    """Applies a model whose parameters are for images of 32x32x3 to others."""
    return model.apply(init(model, jnp.zeros((1, 32, 32, 3))), jnp.zeros((1, *image_shape)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: models.create("B/x"), "Unknown variant 'B/x'.*B/16"),
        (lambda: models.create("XL/16"), "sizes Ti, S, B, L, H"),
        (lambda: models.create("R101+B/32"), r"Unknown variant 'R101\+B/32'.*R50\+B/16"),
        (lambda: models.create("B/16", dropot_rate=0.1), "did you mean dropout_rate"),
        (lambda: tiny_model(width=30), "width 30 is not divisible by model.num_heads 4"),
        (lambda: tiny_model(pool="mean"), "model.pool is 'mean'.* 'cls', 'gap', .*'map' or 'none'"),
        (lambda: tiny_model(remat="everything"), "model.remat is 'everything'; it must be 'auto'"),
        (lambda: tiny_model(depth=0), "model.depth is 0; it must be a whole number >= 1"),
        (lambda: tiny_model(num_heads=0), "model.num_heads is 0"),
        (lambda: tiny_model(representation_size=1.5), "model.representation_size is 1.5"),
        (lambda: tiny_model(representation_size=-4), "is -4; it must be a whole number >= 1"),
        (lambda: tiny_model(layer_norm_eps=0.0), "layer_norm_eps is 0.0; it must be a number > 0"),
        (lambda: tiny_model(patch_size="x"), "model.patch_size is 'x'"),
        (
            lambda: tiny_model(dropout_rate=1.5),
            "model.dropout_rate is 1.5; it must be a number >= 0 and < 1",
        ),
        (lambda: tiny_model(stochastic_depth_rate=1.0), "model.stochastic_depth_rate is 1.0"),
        (
            lambda: tiny_model(norm="post", residual_dtype="float32"),
            "residual_dtype is 'float32', which needs model.norm 'pre', not 'post'",
        ),
        (
            lambda: tiny_model(residual_dtype="bfloat16"),
            "residual_dtype is 'bfloat16', which needs config.dtype 'bfloat16', not 'float32'",
        ),
        (lambda: tiny_model(matmul_precision="bf16"), "config.matmul_precision is 'bf16'"),
        (lambda: tiny_model(attention_impl="flash"), "attention_impl is 'flash'; .*'pallas'"),
        (lambda: tiny_model(dtype="float16"), "dtype is 'float16'"),
        (
            lambda: apply(tiny_model(), {}, jnp.zeros((1, 32, 32, 3)), capture=("attn",)),
            "capture is 'attn'; it must be 'blocks', 'attention' or 'tokens'",
        ),
        (lambda: tiny_model(width=30, num_heads=3, posemb="sincos2d"), "divisible by 4"),
        (
            lambda: models.check_image(tiny_model(), (32, 30)),
            "image width 30 .* patch size 8.* 24 or 32",
        ),
        (
            lambda: models.check_image(models.create("R50+B/16"), (224, 230)),
            "image width 230 .* patch size 16.* 224 or 240",
        ),
        (
            lambda: apply(tiny_model(posemb="none"), {}, jnp.zeros((1, 30, 32, 3))),
            "image height 30 is not divisible by the patch size 8",
        ),
        (
            lambda: apply(tiny_model().clone(pool="mean"), {}, jnp.zeros((1, 32, 32, 3))),
            "model.pool is 'mean'",
        ),
        (
            lambda: apply(tiny_model(), {}, jnp.zeros((1, 32, 32, 3), jnp.uint8)),
            "images are uint8; they must be floating point, normalized",
        ),
        (
            lambda: apply(tiny_model(), {}, jnp.zeros((2, 3, 32, 32))),
            r"images are \(2, 3, 32, 32\); they must be \(N, height, width, channels\)",
        ),
        (
            lambda: apply_to_others(tiny_model(scan=True), (48, 32, 3)),
            r"images of 48x32 have 6x4 patches; .* positions for 16: .*image_size=\(48, 32\)",
        ),
        (
            lambda: apply_to_others(models.create("R+Ti/16", num_classes=2, depth=1), (32, 32, 1)),
            "images have 1 channels; the model's parameters are for 3",
        ),
        (
            lambda: tiny_model(depth=1).apply(
                init(tiny_model(), jnp.zeros((1, 32, 32, 3))), jnp.zeros((1, 32, 32, 3))
            ),
            "the model has depth 1; the parameters have 2 blocks",
        ),
        (
            lambda: apply(tiny_model().clone(remat="ful"), {}, jnp.zeros((1, 32, 32, 3))),
            "model.remat is 'ful'; it must be 'auto'",
        ),
        (
            lambda: models.from_config(common.get_config().to_dict()),
            "config is a dict without model and num_classes; it must be a run's ConfigDict",
        ),
        (lambda: tiny_model(dtype=jnp.int32), "config.dtype is 'int32'; it must be"),
        (lambda: tiny_model(gelu="gleu"), "model.gelu is 'gleu'; it must be 'tanh'"),
        (stem(num_layers=(2,), width_factor=0.3), "width_factor is 0.3; it must be a multiple"),
        (stem(layers=3), "model.resnet is .*; it must have num_layers"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(UserError, match=message) as raised:
        make()
    assert "\n" not in str(raised.value)
