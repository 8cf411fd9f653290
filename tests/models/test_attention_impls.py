"""Attention: parameters, implementations, and which one a device gets."""

import functools
import logging
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_model

from vit_jax import models
from vit_jax.errors import UserError
from vit_jax.models import attention, tpu_attention
from vit_jax.parallel import mesh as meshes
from vit_jax.parallel import sharding

XAVIER = nn.initializers.xavier_uniform()


def draw(*shapes, dtype="float32"):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def mask_of(n, length):
    return jnp.asarray(np.random.default_rng(1).random((n, length)) < 0.7)


def plain(query, key, value, mask, num_heads):
    return attention.plain_attention(query, key, value, mask, num_heads, lambda x: x, None)


def test_parameters_and_outputs_are_those_of_flax():
    x, context = draw((2, 5, 24), (2, 7, 24))
    mask = mask_of(2, 7)
    ours = attention.MultiHeadDotProductAttention(3, XAVIER, jnp.float32)
    theirs = nn.MultiHeadDotProductAttention(3, kernel_init=XAVIER)
    key = jax.random.key(0)
    variables = jax.jit(theirs.init)(key, x, context)
    jax.tree.map(
        np.testing.assert_array_equal, jax.jit(ours.init)(key, x, context, mask), variables
    )
    variables = jax.tree.map(lambda leaf: leaf + 0.1, variables)
    expected = theirs.apply(variables, x, context, mask=mask[:, None, None])
    np.testing.assert_allclose(ours.apply(variables, x, context, mask), expected, atol=1e-5)


def test_the_gradient_of_a_bias_is_the_sum_of_the_gradients():
    x, bias, gradient = draw((2, 5, 8), (8,), (2, 5, 8))
    dx, dbias = jax.vjp(attention.add_bias, x, bias)[1](gradient)
    np.testing.assert_array_equal(dx, gradient)
    np.testing.assert_allclose(dbias, gradient.sum((0, 1)), rtol=1e-5)


@pytest.mark.parametrize("function", [attention.cpu_attention, attention.library_attention])
@pytest.mark.parametrize(("dtype", "atol"), [("float32", 3e-6), ("bfloat16", 3e-2)])
@pytest.mark.parametrize("masked", [False, True])
def test_matrix_products_give_the_plain_attention(function, dtype, atol, masked):
    """Outputs and gradients, on a CPU and on devices without a kernel."""
    *inputs, gradient = draw((2, 7, 24), (2, 9, 24), (2, 9, 24), (2, 7, 24), dtype=dtype)
    mask = mask_of(2, 9) if masked else None

    def with_heads(query, key, value):
        split = (attention.split_heads(x, 3) for x in (query, key, value))
        return attention.join_heads(function(*split, mask))

    out, vjp = jax.vjp(with_heads, *inputs)
    expected, expected_vjp = jax.vjp(lambda *args: plain(*args, mask, 3), *inputs)
    for ours, theirs in zip(
        (out, *vjp(gradient)), (expected, *expected_vjp(gradient)), strict=True
    ):
        assert ours.dtype == dtype
        np.testing.assert_allclose(np.float32(ours), np.float32(theirs), atol=atol, rtol=atol)


KERNEL_CASES = {
    # Head sizes of the published models, odd numbers of heads, heads across registers.
    "B/16": dict(length=197, num_heads=2, head_dim=64),
    "odd": dict(length=50, num_heads=3, head_dim=64),
    "So400m": dict(length=33, num_heads=4, head_dim=72, masked=True),
    "H": dict(length=16, num_heads=2, head_dim=80),
    "g": dict(length=20, num_heads=3, head_dim=88),
    "G": dict(length=21, num_heads=2, head_dim=104, masked=True),
    "small": dict(length=16, num_heads=3, head_dim=8, masked=True),
}


@pytest.mark.parametrize(
    "case",
    [
        *("B/16", "odd", "So400m"),
        *(pytest.param(case, marks=pytest.mark.slow) for case in ("H", "g", "G", "small")),
    ],
)
@pytest.mark.parametrize(("dtype", "atol"), [("float32", 3e-6), ("bfloat16", 3e-2)])
def test_the_tpu_kernel_computes_plain_attention(case, dtype, atol):
    check_kernel(**KERNEL_CASES[case], dtype=dtype, atol=atol)


def check_kernel(*, length, num_heads, head_dim, dtype="float32", atol=3e-6, masked=False):
    """Compares outputs and gradients with plain attention in float32."""
    arrays = draw(*[(2, length, num_heads * head_dim)] * 4, dtype=dtype)
    mask = mask_of(2, length) if masked else None
    function = functools.partial(
        tpu_attention.attention, mask=mask, num_heads=num_heads, interpret=True
    )
    expected = functools.partial(plain, mask=mask, num_heads=num_heads)
    results = outputs_and_gradients(function, *arrays)
    references = outputs_and_gradients(expected, *(x.astype(jnp.float32) for x in arrays))
    for result, reference in zip(results, references, strict=True):
        assert result.dtype == dtype
        np.testing.assert_allclose(result.astype(jnp.float32), reference, atol=atol)


def outputs_and_gradients(function, query, key, value, d_out):
    out, gradients = jax.vjp(function, query, key, value)
    return out, *gradients(d_out)


@pytest.mark.slow
def test_heads_in_several_grid_steps_compute_the_same(monkeypatch):
    """With many tokens, a grid step computes some of the heads."""
    assert tpu_attention.columns_per_step(577, 1024, 16) == 128
    assert tpu_attention.columns_per_step(577, 192, 3) == 192  # half a register can't be separated
    monkeypatch.setattr(tpu_attention, "SCORES_PER_STEP", 1)
    assert tpu_attention.columns_per_step(16, 256, 4) == 128
    check_kernel(length=16, num_heads=4, head_dim=64, masked=True)


@pytest.mark.parametrize("axes", [dict(data=8), dict(data=2, fsdp=2, tensor=2)])
@pytest.mark.parametrize("masked", [False, True])
def test_the_tpu_kernel_on_a_mesh(axes, masked):
    arrays, mask = draw(*[(8, 16, 4 * 32)] * 4), mask_of(8, 16) if masked else None
    mesh = meshes.create_mesh(**axes)

    def compute(*arrays):
        function = functools.partial(
            tpu_attention.attention, mask=mask, num_heads=4, interpret=True
        )
        return outputs_and_gradients(function, *arrays)

    results = jax.jit(sharding.with_mesh(compute, mesh))(
        *jax.device_put(arrays, meshes.batch_sharding(mesh))
    )
    expected = outputs_and_gradients(functools.partial(plain, mask=mask, num_heads=4), *arrays)
    for result, reference in zip(results, expected, strict=True):
        np.testing.assert_allclose(result, reference, atol=3e-6)


def test_what_the_tpu_kernel_serves():
    bfloat16 = jnp.bfloat16
    for length, width, num_heads in (
        (197, 192, 3),
        (577, 768, 12),
        (577, 1024, 16),
        (257, 1664, 16),
    ):
        assert tpu_attention.fits(length, width, num_heads, bfloat16)
    assert not tpu_attention.fits(4_097, 768, 12, bfloat16)
    # On a mesh, a device computes some of the heads, or none if they can't be split.
    for num_heads, expected in ((16, True), (6, False)):
        mesh = meshes.create_mesh(data=2, tensor=4)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            assert tpu_attention.fits(729, 72 * num_heads, num_heads, bfloat16) == expected
    assert not tpu_attention.fits(729, 72 * 16, 16, bfloat16)


def test_an_image_whose_tokens_are_all_masked():
    """Is computed as if none was; its gradients belong to its outputs."""
    arrays = draw(*[(2, 16, 64)] * 4)
    mask = jnp.asarray([[False] * 16, [True] * 8 + [False] * 8])
    kernel = functools.partial(tpu_attention.attention, num_heads=2, interpret=True)
    results = outputs_and_gradients(functools.partial(kernel, mask=mask), *arrays)
    expected = outputs_and_gradients(functools.partial(kernel, mask=mask.at[0].set(True)), *arrays)
    jax.tree.map(np.testing.assert_array_equal, results, expected)


@pytest.mark.parametrize("length", [5, 8, 197])
@pytest.mark.parametrize("masked", [False, True])
def test_tokens_that_pad_cudnn_are_ignored(length, masked, monkeypatch):
    """With XLA in place of cuDNN, which takes the same arguments."""
    original = jax.nn.dot_product_attention
    lengths = []

    def replaced(query, *args, implementation, **kwargs):
        assert implementation == "cudnn"
        lengths.append(query.shape[1])
        return original(query, *args, implementation="xla", **kwargs)

    monkeypatch.setattr(jax.nn, "dot_product_attention", replaced)
    arrays, mask = draw(*[(2, length, 3, 8)] * 3), mask_of(2, length) if masked else None
    result = attention.cudnn_attention(*arrays, mask)
    expected = original(*arrays, mask=None if mask is None else mask[:, None, None])
    np.testing.assert_allclose(result, expected, atol=1e-6)
    assert lengths[0] % 8 == 0


def device(platform, kind, **attributes):
    return types.SimpleNamespace(platform=platform, device_kind=kind, **attributes)


TPU, OLD_TPU = device("tpu", "TPU v5 lite"), device("tpu", "TPU v4")
GPU, CPU = device("cuda", "NVIDIA H100", compute_capability="9.0"), device("cpu", "cpu")
AMD = device("gpu", "AMD Instinct MI300X", compute_capability="gfx942")
OLD_GPU = device("cuda", "Tesla V100", compute_capability="7.0")


def test_auto_is_the_fastest_that_serves():
    for chip, dtype, head_dim, expected in (
        (TPU, jnp.bfloat16, 64, "pallas"),
        (TPU, jnp.float32, 64, "pallas"),
        (OLD_TPU, jnp.bfloat16, 64, "xla"),
        (GPU, jnp.bfloat16, 64, "cudnn"),
        (GPU, jnp.bfloat16, 60, "xla"),
        (GPU, jnp.float32, 64, "xla"),
        (OLD_GPU, jnp.bfloat16, 64, "xla"),
        (AMD, jnp.bfloat16, 64, "xla"),
        (TPU, jnp.bfloat16, 12, "xla"),
        (CPU, jnp.bfloat16, 64, "xla"),
    ):
        assert attention.fastest(chip, dtype, head_dim) == expected


def test_an_implementation_that_does_not_serve_is_refused_in_training():
    for impl, chip, message in (
        ("cudnn", CPU, "'cudnn' needs an NVIDIA GPU, not cpu: use 'auto', .* 'xla' here"),
        ("cudnn", GPU, "'cudnn' needs config.dtype 'bfloat16': .*'xla' here"),
        ("pallas", GPU, "'pallas' needs a TPU, not NVIDIA H100"),
        ("pallas", OLD_TPU, "'pallas' needs more vector memory than TPU v4 has"),
    ):
        with pytest.raises(UserError, match=message):
            attention.resolve(tiny_model(attention_impl=impl), chip)
    assert attention.resolve(tiny_model(attention_impl="xla"), TPU) == "xla"
    assert attention.resolve(tiny_model(), TPU) == "pallas"


@pytest.mark.parametrize("impl", ["cudnn", "pallas"])
def test_a_model_of_another_device_runs_here(impl, caplog):
    """As do the checkpoints of a run that was trained on an accelerator."""
    query, key, value = draw(*[(1, 4, 16)] * 3)
    attention.log_once.cache_clear()
    with caplog.at_level(logging.WARNING, "vit_jax"):
        for _ in range(2):
            result = attention.attend(query, key, value, None, 2, impl)
    np.testing.assert_array_equal(result, attention.attend(query, key, value, None, 2, "xla"))
    assert len(caplog.messages) == 1
    assert f"computed by XLA: model.attention_impl '{impl}' needs" in caplog.text


def test_the_summary_tells_what_computes_attention():
    model = models.create("H/14", num_classes=10, dtype="bfloat16")
    assert attention.describe(model, "pallas", model.num_tokens((224, 224))) == "pallas"
    text = attention.describe(model, "pallas", model.num_tokens((378, 378)))
    assert text == "xla, since 730 tokens are too many for the kernel 'pallas'"
    model = models.create("B/16", num_classes=10, attention_dropout_rate=0.1)
    text = attention.describe(model, "cudnn", 197)
    assert text == "xla in training, because of attention dropout; cudnn in evaluation"
    assert attention.describe(model, "xla", 197) == "xla"
