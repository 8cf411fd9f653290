"""Counting parameters and FLOPs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_model

from vit_jax.scaling import flops


def test_num_params_counts_arrays_and_shapes():
    tree = {"kernel": np.zeros((3, 4)), "bias": jax.ShapeDtypeStruct((4,), jnp.float32)}
    assert flops.num_params(tree) == 3 * 4 + 4


@pytest.mark.parametrize(
    "fields",
    [
        dict(patch_size=8),
        dict(patch_size=8, pool="map"),
        dict(patch_size=1, resnet=dict(num_layers=(1, 2), width_factor=0.5)),
    ],
    ids=["plain", "map", "hybrid"],
)
def test_forward_flops_agree_with_xla(fields):
    size = dict(width=128, num_heads=4, mlp_dim=512, depth=2, representation_size=64)
    model = tiny_model(**size | fields)
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), images)
    counted = jax.jit(model.apply).lower(shapes, images).cost_analysis()["flops"]
    assert flops.forward_flops(model, (64, 64, 3)) == pytest.approx(counted, rel=0.03)
