"""The partition table that a run logs."""

import math
import re

import jax
import pytest
from conftest import tiny_model

from vit_jax.errors import UserError
from vit_jax.parallel import sharding
from vit_jax.parallel.mesh import create_mesh


def sharded_shapes(mesh, **fields):
    """The shapes of a tiny model's parameters, with their shardings."""
    model = tiny_model(**fields)
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), "float32")
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    return jax.tree.map(
        lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s),
        shapes,
        sharding.state_sharding(shapes, mesh),
    )


def row(table, name):
    return next(line for line in table if line.startswith(name)).removeprefix(name).strip()


def test_the_table_has_shape_partition_and_bytes():
    mesh = create_mesh(data=1, fsdp=4, tensor=2)
    shapes = sharded_shapes(mesh)
    table = sharding.partition_table(shapes, mesh)
    mlp = row(table, "Transformer/encoderblock_*/MlpBlock_0/Dense_0/kernel")
    # 32 x 64 floats in each of two blocks, over eight devices.
    assert re.split("  +", mlp) == ["2 x (32, 64)", "fsdp, tensor", "2,048"]
    assert "replicated" in row(table, "Transformer/encoder_norm/scale")
    total = sum(int(line.split()[-1].replace(",", "")) for line in table[1:])
    leaves = jax.tree.leaves(shapes)
    assert total == sum(4 * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)


def test_the_table_names_mesh_axes_that_divide_nothing():
    mesh = create_mesh(data=1, fsdp=1, tensor=8)
    table = sharding.partition_table(sharded_shapes(mesh), mesh)
    query = row(table, "Transformer/encoderblock_*/MultiHeadDotProductAttention_0/query/kernel")
    assert "replicated (tensor divides no axis)" in query  # it has four heads
    assert "tensor" in row(table, "Transformer/encoderblock_*/MlpBlock_0/Dense_0/kernel")
    mesh = create_mesh(data=1, fsdp=8)
    shapes = sharded_shapes(mesh, width=36, num_heads=4, num_classes=7, mlp_dim=60)
    table = sharding.partition_table(shapes, mesh)
    assert "replicated (fsdp divides no axis)" in row(table, "head/kernel")


def test_tensor_parallelism_refuses_unknown_parameters_of_a_block():
    name = "Transformer/encoderblock_0/Gate_0/kernel"
    with pytest.raises(UserError, match=f"{name}: .*BLOCK_PARAMETERS .* no row for Gate_0/kernel"):
        sharding.partition(name, (32, 32), create_mesh(tensor=2))
    sharding.partition(name, (32, 32), create_mesh(fsdp=2))
