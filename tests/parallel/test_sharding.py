"""The table of what lies where."""

import math
import re

import jax
from conftest import tiny_model

from vit_jax.parallel import mesh as meshes
from vit_jax.parallel import sharding


def placed(mesh, **fields):
    """A tiny model's parameters, as shapes with their shardings."""
    model = tiny_model(**fields)
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), "float32")
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    where = sharding.state_sharding(shapes, mesh)
    return jax.tree.map(
        lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), shapes, where
    )


def line(table, name):
    return next(row for row in table if row.startswith(name)).removeprefix(name).strip()


def test_the_table_names_shape_partition_and_bytes():
    mesh = meshes.create_mesh(data=1, fsdp=4, tensor=2)
    table = sharding.partition_table(placed(mesh), mesh)
    mlp = line(table, "Transformer/encoderblock_*/MlpBlock_0/Dense_0/kernel")
    # 32 x 64 floats of each of two blocks, over eight devices.
    assert re.split("  +", mlp) == ["2 x (32, 64)", "fsdp, tensor", "2,048"]
    assert "whole" in line(table, "Transformer/encoder_norm/scale")
    total = sum(int(row.split()[-1].replace(",", "")) for row in table[1:])
    leaves = jax.tree.leaves(placed(mesh))
    assert total == sum(4 * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)


def test_what_no_axis_of_the_mesh_divides_stays_whole_and_says_so():
    mesh = meshes.create_mesh(data=1, fsdp=1, tensor=8)  # four heads
    table = sharding.partition_table(placed(mesh), mesh)
    query = line(table, "Transformer/encoderblock_*/MultiHeadDotProductAttention_0/query/kernel")
    assert "whole (tensor divides no axis)" in query
    assert "tensor" in line(table, "Transformer/encoderblock_*/MlpBlock_0/Dense_0/kernel")
    mesh = meshes.create_mesh(data=1, fsdp=8)
    table = sharding.partition_table(
        placed(mesh, width=36, num_heads=4, num_classes=7, mlp_dim=60), mesh
    )
    assert "whole (fsdp divides no axis)" in line(table, "head/kernel")
    assert len(table) == len(sharding.partition_table(placed(mesh), mesh))
