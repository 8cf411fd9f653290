"""Meshes over eight devices, and batches that they can split."""

import pytest

from vit_jax.errors import UserError
from vit_jax.parallel.mesh import check_batch_size, create_mesh, num_shards


def test_one_axis_takes_the_remaining_devices():
    mesh = create_mesh(data=-1, fsdp=2, tensor=2)
    assert dict(mesh.shape) == dict(data=2, fsdp=2, tensor=2)
    assert num_shards(mesh) == 4


@pytest.mark.parametrize(
    "axes", [dict(data=3), dict(fsdp=16), dict(data=-1, fsdp=-1), dict(data=0)]
)
def test_a_product_that_is_not_the_number_of_devices(axes):
    with pytest.raises(UserError, match="doesn't fit 8 devices: the product must be 8"):
        create_mesh(**axes)


def test_batches_that_cannot_be_split():
    mesh = create_mesh()
    check_batch_size(16, 2, mesh)
    with pytest.raises(UserError, match="batch_size 12 is not divisible by 8 devices.*use 16"):
        check_batch_size(12, 1, mesh)
    with pytest.raises(UserError, match="batch_size 8 .* 8 devices x 3 accumulation steps"):
        check_batch_size(8, 3, mesh)
