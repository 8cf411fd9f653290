import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import randomized, tiny_model

from vit_jax import models
from vit_jax.errors import UserError
from vit_jax.models.stacking import stack_blocks, unstack_blocks
from vit_jax.scaling import flops

PARAMETERS = {
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


def init(model, images):
    return {"params": randomized(model.init(jax.random.key(0), images, train=False)["params"])}


@pytest.mark.parametrize("variant", PARAMETERS)
def test_published_sizes(variant):
    model = models.create(variant, num_classes=1000)
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    params = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)
    assert flops.num_params(params) == PARAMETERS[variant]


DROP = dict(dropout_rate=0.2, attention_dropout_rate=0.1, stochastic_depth_rate=0.3)


@functools.partial(jax.jit, static_argnums=2)
@functools.partial(jax.value_and_grad)
def loss_and_grads(params, images, model):
    rngs = {"dropout": jax.random.key(3)}
    return jnp.sum(model.apply({"params": params}, images, train=True, rngs=rngs) ** 2)


@pytest.fixture(scope="module")
def plain(images):
    model = tiny_model(depth=3, **DROP)
    params = init(model, images)["params"]
    return params, *loss_and_grads(params, images, model)


@pytest.mark.parametrize(
    ("scan", "remat"),
    [(True, "none"), (True, "full"), (False, "full"), (True, "dots_with_no_batch_dims_saveable")],
)
def test_scan_and_remat_change_nothing(images, plain, scan, remat):
    """Same outputs and gradients as the plain loop, with all three kinds of dropout on."""
    params, expected, expected_grads = plain
    params = stack_blocks(params) if scan else params
    model = tiny_model(depth=3, scan=scan, remat=remat, **DROP)
    value, grads = loss_and_grads(params, images, model)
    grads = unstack_blocks(grads) if scan else grads
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), grads, expected_grads
    )


def test_scan_initialises_layers_apart(images):
    params = tiny_model(scan=True).init(jax.random.key(0), images)["params"]
    kernel = params["Transformer"]["encoderblock"]["MlpBlock_0"]["Dense_0"]["kernel"]
    assert not np.allclose(kernel[0], kernel[1])


@pytest.mark.parametrize("pool", ["cls", "gap", "map", "none"])
@pytest.mark.parametrize("posemb", ["sincos2d", "none"])
def test_masked_padding_leaves_logits(pool, posemb):
    """A 16x24 image, padded at the right and below to 32x40, patches in row order."""
    model = tiny_model(pool=pool, posemb=posemb)
    small = jax.random.normal(jax.random.key(0), (2, 16, 24, 3))
    variables = init(model, small)
    large = jnp.pad(small, ((0, 0), (0, 16), (0, 16), (0, 0)), constant_values=3.0)
    mask = np.zeros((2, 4, 5), bool)
    mask[:, :2, :3] = True
    expected = model.apply(variables, small)
    logits = model.apply(variables, large, mask=jnp.asarray(mask.reshape(2, 20)))
    if pool == "none":
        logits = logits.reshape(2, 4, 5, 10)[:, :2, :3].reshape(2, 6, 10)
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    if pool != "none":  # and the padding would have counted
        assert np.abs(model.apply(variables, large) - expected).max() > 1e-3


def test_masked_padding_with_learned_positions():
    model = tiny_model(pool="cls")
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
        model.apply(variables, large, mask=mask), model.apply(small, large[:, :16]), atol=1e-5
    )


@pytest.mark.parametrize("fields", [{}, {"scan": True}, {"norm": "post", "pool": "gap"}])
def test_captured_outputs(images, fields):
    """Blocks and attention come out, the logits stay, and the last block leads to them."""
    model = tiny_model(**fields)
    variables = init(model, images)
    logits, captured = model.apply(variables, images, capture=("blocks", "attention"))
    np.testing.assert_allclose(logits, model.apply(variables, images), atol=1e-5)
    tokens = 16 if fields.get("pool") == "gap" else 17
    assert captured["blocks"].shape == (2, 3, tokens, 32)
    assert captured["attention"].shape == (2, 3, 4, tokens, tokens)
    np.testing.assert_allclose(captured["attention"].sum(-1), 1.0, rtol=1e-5)
    if "norm" in fields:  # a post-norm encoder ends in its last block
        head = variables["params"]["head"]
        pooled = captured["blocks"][-1].mean(axis=1)
        np.testing.assert_allclose(pooled @ head["kernel"] + head["bias"], logits, atol=1e-4)


def test_post_norm_normalises_each_sum(images):
    model = tiny_model(norm="post")
    variables = model.init(jax.random.key(0), images)
    assert "encoder_norm" not in variables["params"]["Transformer"]
    _, captured = model.apply(variables, images, capture=("blocks",))
    np.testing.assert_allclose(captured["blocks"].mean(-1), 0.0, atol=1e-5)
    np.testing.assert_allclose(captured["blocks"].std(-1), 1.0, atol=1e-3)


def test_shapes_that_are_not_square(images):
    model = tiny_model(patch_size=(4, 8), pool="gap")
    wide = jax.random.normal(jax.random.key(0), (2, 16, 40, 5))
    logits, captured = model.apply(init(model, wide), wide, capture=("blocks",))
    assert logits.shape == (2, 10)
    assert captured["blocks"].shape == (2, 2, 4 * 5, 32)


def test_a_fresh_head_says_its_bias(images):
    logits, _ = tiny_model(head_bias_init=-6.9).init_with_output(jax.random.key(0), images)
    np.testing.assert_array_equal(logits, np.full((3, 10), -6.9, np.float32))


def test_stochastic_depth_drops_whole_examples(images):
    """At rate 1 the last block is the identity for every example, and the first never is."""
    model = tiny_model(stochastic_depth_rate=0.999999)
    variables = init(model, images)
    train = dict(train=True, rngs={"dropout": jax.random.key(0)}, capture=("blocks",))
    _, dropped = model.apply(variables, images, **train)
    _, kept = model.apply(variables, images, capture=("blocks",))
    np.testing.assert_allclose(dropped["blocks"][0], kept["blocks"][0], atol=1e-5)
    np.testing.assert_allclose(dropped["blocks"][1], dropped["blocks"][0], atol=1e-5)


def test_stochastic_depth_keeps_the_mean():
    from vit_jax.models.vit import drop_path

    x = jnp.ones((20_000, 1, 1))
    out = drop_path(x, jnp.float32(0.25), jax.random.key(0))
    assert set(np.unique(out)) <= {0.0, np.float32(1 / 0.75)}
    np.testing.assert_allclose(out.mean(), 1.0, atol=0.02)


@pytest.mark.parametrize("gelu", ["tanh", "exact"])
def test_gelu(gelu):
    from vit_jax.models.vit import MlpBlock

    x = jnp.linspace(-3, 3, 12).reshape(1, 3, 4)
    block = MlpBlock(mlp_dim=4, gelu=gelu)
    identity = {"kernel": jnp.eye(4), "bias": jnp.zeros(4)}
    out = block.apply({"params": {"Dense_0": identity, "Dense_1": identity}}, x)
    inner = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
    exact = jax.scipy.stats.norm.cdf(x) * x
    expected = 0.5 * x * (1 + np.tanh(inner)) if gelu == "tanh" else exact
    np.testing.assert_allclose(out, expected, atol=1e-6)


def test_bfloat16_keeps_parameters_and_logits_in_float32(images):
    model = tiny_model(dtype="bfloat16", pool="map", representation_size=16)
    variables = init(model, images)
    assert {leaf.dtype for leaf in jax.tree.leaves(model.init(jax.random.key(0), images))} == {
        jnp.dtype("float32")
    }
    logits, captured = model.apply(variables, images, capture=("blocks",))
    assert logits.dtype == jnp.float32
    assert captured["blocks"].dtype == jnp.bfloat16
    full = tiny_model(pool="map", representation_size=16).apply(variables, images)
    np.testing.assert_allclose(logits, full, atol=0.1)


@pytest.mark.parametrize("resnet", [None, dict(num_layers=(1, 2), width_factor=0.5)])
def test_flops_agree_with_the_compiler(resnet):
    fields = dict(width=128, num_heads=4, mlp_dim=512, depth=3, representation_size=64)
    model = tiny_model(**fields, resnet=resnet, patch_size=8 if resnet is None else 1)
    images = jnp.zeros((1, 64, 64, 3))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images))
    compiled = jax.jit(lambda v: model.apply(v, images)).lower(shapes).compile()
    counted = compiled.cost_analysis()["flops"]
    assert flops.forward_flops(model, (64, 64, 3)) == pytest.approx(counted, rel=0.1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: models.create("B/x"), "Unknown variant 'B/x'.*B/16"),
        (lambda: models.create("XL/16"), "Ti, S, B, L, H"),
        (lambda: models.create("B/16", dropot_rate=0.1), "did you mean dropout_rate"),
        (lambda: tiny_model(width=30), "width 30 is not divisible by model.num_heads 4"),
        (lambda: tiny_model(pool="mean"), "model.pool is 'mean'.*'cls', 'gap', 'map', 'none'"),
        (lambda: tiny_model(remat="everything"), "model.remat is 'everything'"),
        (lambda: tiny_model(depth=0), "model.depth is 0; it takes whole numbers above 0"),
        (lambda: tiny_model(num_heads=0), "model.num_heads is 0"),
        (lambda: tiny_model(patch_size="x"), "model.patch_size is 'x'"),
        (lambda: tiny_model(dropout_rate=1.5), r"model.dropout_rate is 1.5; it lies in \[0, 1\)"),
        (lambda: tiny_model(stochastic_depth_rate=1.0), "model.stochastic_depth_rate is 1.0"),
        (lambda: tiny_model(attention_impl="cudnn"), "'cudnn' needs a GPU; this is a cpu"),
        (lambda: tiny_model(dtype="float16"), "dtype is 'float16'"),
        (
            lambda: tiny_model().init(
                jax.random.key(0), jnp.zeros((1, 32, 32, 3)), capture=("attn",)
            ),
            "capture has 'attn'; it can have blocks, attention",
        ),
        (lambda: tiny_model(width=30, num_heads=3, posemb="sincos2d"), "divisible by 4"),
        (
            lambda: models.checks.check_image(tiny_model(), (32, 30)),
            "image width 30 .* patch size 8.* 24 or 32",
        ),
        (
            lambda: models.checks.check_image(models.create("R50+B/16"), (224, 230)),
            "image width 230 .* patch size 16.* 224 or 240",
        ),
        (lambda: models.create("R50+B/32"), r"Unknown variant 'R50\+B/32'.*R50\+B/16"),
        (
            lambda: tiny_model(resnet=dict(num_layers=(2,), width_factor=0.3)),
            "width_factor is 0.3; it takes multiples of 0.5",
        ),
        (lambda: tiny_model(resnet=dict(layers=3)), "model.resnet has layers; it takes num_layers"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(UserError, match=message) as raised:
        make()
    assert "\n" not in str(raised.value)
