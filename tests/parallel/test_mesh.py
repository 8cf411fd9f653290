"""Meshes over eight devices, and batches that they can split."""

import dataclasses

import jax
import numpy as np
import pytest

from vit_jax.errors import UserError
from vit_jax.parallel import sharding
from vit_jax.parallel.mesh import (
    batch_sharding,
    check_batch_size,
    check_slices,
    count_slices,
    create_mesh,
    num_shards,
    place_devices,
)


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


def test_each_slice_holds_a_whole_copy_of_what_fsdp_splits():
    """And the same part of the batch as without slices."""
    mesh = create_mesh(data=-1, fsdp=2, tensor=2, slices=2)
    assert dict(mesh.shape) == dict(data=2, fsdp=2, tensor=2)
    slices = np.split(np.array(jax.devices()), 2)
    shape = (64, 32)
    spec = sharding.partition("Transformer/encoderblock_0/MlpBlock_0/Dense_0/kernel", shape, mesh)
    held = jax.sharding.NamedSharding(mesh, spec).devices_indices_map(shape)
    for devices in slices:
        counts = np.zeros(shape, int)
        for device in devices:
            counts[held[device]] += 1
        assert (counts == 1).all()
    for devices, examples in zip(slices, (slice(0, 8), slice(8, 16)), strict=True):
        held = batch_sharding(mesh).devices_indices_map((16,))
        rows = {i for device in devices for i in range(*held[device][0].indices(16))}
        assert rows == {*range(16)[examples]}


@dataclasses.dataclass(frozen=True)
class Device:
    """What `create_mesh` looks at."""

    id: int
    slice_index: int
    platform: str = "gpu"
    device_kind: str = "H100"
    process_index: int = 0


def test_slices_are_recognized():
    """Hosts with GPUs, here of four, whose boundaries other meshes may ignore."""
    devices = [Device(i, i // 4) for i in range(8)]
    assert count_slices(devices) == 2
    assert check_slices(None, [4, 2, 1], devices) == 2
    assert check_slices(None, [1, 8, 1], devices) == 1
    placed = place_devices([4, 2, 1], 2, devices[::-1])
    assert [[device.slice_index for device in row] for row in placed[..., 0]] == [
        *([0, 0], [0, 0]),
        *([1, 1], [1, 1]),
    ]
    tpus = [dataclasses.replace(device, platform="tpu") for device in devices]
    with pytest.raises(
        UserError, match="config.mesh.slices is 2, which doesn't fit data=1, fsdp=8"
    ):
        check_slices(None, [1, 8, 1], tpus)
    with pytest.raises(UserError, match="config.mesh.slices is 4, but the TPUs are 2 slices"):
        check_slices(4, [8, 1, 1], tpus)


@pytest.mark.parametrize("axes", [dict(slices=3), dict(slices=0), dict(slices=2, data=1, fsdp=8)])
def test_slices_that_do_not_fit(axes):
    with pytest.raises(UserError, match=r"config.mesh.slices is \d, which doesn't fit data=\d"):
        create_mesh(**axes)


def test_batches_that_cannot_be_split():
    mesh = create_mesh()
    check_batch_size(16, 2, mesh)
    with pytest.raises(UserError, match="batch_size 12 is not divisible by 8 devices.*use 16"):
        check_batch_size(12, 1, mesh)
    with pytest.raises(UserError, match="batch_size 8 .* 8 devices x 3 accumulation steps"):
        check_batch_size(8, 3, mesh)
