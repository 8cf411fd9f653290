"""Counting parameters, FLOPs and activations."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_model

from vit_jax import models
from vit_jax.scaling import command, flops


def test_num_params_counts_arrays_and_shapes():
    tree = {"kernel": np.zeros((3, 4)), "bias": jax.ShapeDtypeStruct((4,), jnp.float32)}
    assert flops.num_params(tree) == 3 * 4 + 4


@pytest.mark.parametrize(
    "variant",
    ["s/28", "Ti/16", "S/32", "R+Ti/16", pytest.param("R26+S/32", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("pool", ["cls", "map"])
def test_flops_agree_with_xla(variant, pool):
    model = models.create(variant, depth=2, pool=pool)
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    shapes = jax.eval_shape(functools.partial(model.init, jax.random.key(0)), images)

    def xla_flops(function):
        return jax.jit(function).lower(shapes, images).cost_analysis()["flops"]

    forward = xla_flops(model.apply)
    assert flops.forward_flops(model, (224, 224, 3)) == pytest.approx(forward, rel=0.02)
    if pool == "cls":
        both = xla_flops(jax.grad(lambda params, x: model.apply(params, x, train=True).sum()))
        assert flops.training_flops(model, (224, 224, 3)) == pytest.approx(both, rel=0.02)


# arXiv:2010.11929, Table 6: epochs of 303 million images, exaFLOPs of pre-training.
WORDS = """
    B/32 7 55, B/16 7 224, L/32 7 196, L/16 7 783, L/16 14 1567, H/14 14 4262, R50+B/32 7 106,
    R50+B/16 7 274, R50+L/32 7 246, R50+L/16 7 859, R50+L/16 14 1668"""


@pytest.mark.parametrize("row", WORDS.split(","))
def test_exaflops_of_an_image_is_worth_16x16_words(row):
    variant, epochs, exaflops = row.split()
    forward = flops.forward_flops(models.create(variant), (224, 224, 3))
    assert 3 * forward * 303e6 * int(epochs) / 1e18 == pytest.approx(float(exaflops), rel=0.03)


# GFLOPs at 224, 384 and 518 pixels: arXiv:2106.04560, Table 2, and arXiv:2305.13035, section 4.
SCALING = """
    s/28 0.7 2.0, s/16 2.2 7.8, S/32 2.3 6.9, Ti/16 2.5 9.5, B/32 8.7 26.0, S/16 9.2 31.2,
    B/28 11.3 30.5, B/16 35.1 111.3, L/16 122.9 382.8, g/14 533.1 1596.4, G/14 965.3 2859.9,
    SoViT-400m/14 221 672 1374"""


@pytest.mark.parametrize("row", SCALING.split(","))
def test_gflops_of_scaling_vision_transformers(row):
    variant, *published = row.split()
    for size, gflops in zip((224, 384, 518), published, strict=False):
        counted = flops.forward_flops(models.create(variant), (size, size, 3)) / 1e9
        assert counted == pytest.approx(float(gflops), rel=0.03)


@pytest.mark.parametrize(("variant", "image_size"), [("Ti/16", 224), ("s/28", 230)])
def test_parameters_are_those_of_the_model(variant, image_size):
    """230 pixels have the 8x8 whole patches of 28 that 224 have."""
    model = models.create(variant)
    images = jnp.zeros((1, 224, 224, 3))
    params = jax.eval_shape(functools.partial(model.init, jax.random.key(0)), images)
    assert flops.count_params(model, (image_size,) * 2 + (3,)) == flops.num_params(params)


def test_activations_agree_with_the_tpu_compiler():
    """Per image, by its temporaries of B/16's training step (docs/pods.md): GiB on a v5e chip."""
    model, shape = models.create("B/16", dtype="bfloat16"), (224, 224, 3)
    kept = (10.23 - 2.4) * 2**30 / (256 - 64)
    assert flops.activation_bytes(model, shape, training=True) == pytest.approx(kept, rel=0.05)
    model = model.clone(attention_impl="xla")
    kept = 4.4 * 2**30 / 64
    assert flops.activation_bytes(model, shape, training=True) == pytest.approx(kept, rel=0.1)


def test_activations_of_a_hybrid_are_mostly_the_stems():
    plain, hybrid = (models.create(f"{stem}B/32") for stem in ("", "R50+"))
    sizes = [flops.activation_bytes(model, (224, 224, 3), True) for model in (plain, hybrid)]
    # Twice the outputs of ResNet-50's convolutions: 11.1 M by arXiv:2003.13678, Table 2.
    assert sizes[1] - sizes[0] == pytest.approx(2 * 4 * 11.1e6, rel=0.02)


def test_command(capsys):
    assert (
        command.main(["flops", "B/16", "L/16", "--image_size=384", "--images=2e9", "--json"]) == 0
    )
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["variant"], first["image_size"], second["variant"]) == ("B/16", 384, "L/16")
    assert first["params"] == 86_859_496  # of google/vit-base-patch16-384
    assert first["train_exaflops"] == pytest.approx(3 * first["gflops"] * 2)
    assert command.main(["flops", "Ti/16", "S/32"]) == 0
    heads, *rows = capsys.readouterr().out.splitlines()[:3]
    assert "exaFLOPs" not in heads
    assert [row.split()[:3] for row in rows] == [["Ti/16", "224", "5.7"], ["S/32", "224", "22.9"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["B/16", "X/16"], "Unknown variant 'X/16'"),
        (["B/16", "--image_size=8"], "images of 8x8 are smaller than a patch of 16x16"),
        (["B/16", "--image_size=-1"], "--image_size is -1; it must be a whole number >= 1"),
        (["B/16", "--images=nan"], "--images is nan; it must be a number > 0"),
    ],
)
def test_mistakes_are_named(arguments, message, capsys):
    assert command.main(["flops", *arguments]) == 2
    output = capsys.readouterr()
    assert message in output.err
    assert output.out == ""


def test_model_fields_count():
    """A tanh layer before the head, and a head for every token."""
    fields = dict(width=128, num_heads=4, mlp_dim=512)
    plain = flops.forward_flops(tiny_model(**fields), (32, 32, 3))
    hidden = flops.forward_flops(tiny_model(**fields, representation_size=64), (32, 32, 3))
    assert hidden - plain == 2 * 128 * 64 + 2 * (64 - 128) * 10
    dense = flops.forward_flops(tiny_model(**fields, pool="none"), (32, 32, 3))
    averaged = flops.forward_flops(tiny_model(**fields, pool="gap"), (32, 32, 3))
    assert dense - averaged == 15 * 2 * 128 * 10
