"""The device mesh, and how batches are split over its axes."""

import math

import jax
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vit_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))  # the partition of a batch's first axis


def create_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices=None) -> Mesh:
    """Creates a mesh with the axes data, fsdp and tensor.

    Args:
        data, fsdp, tensor: the size of each axis; at most one may be -1, which takes the devices
            that the other two leave.
        devices: the devices to use; None: all of them.

    Raises:
        UserError: the product of the sizes isn't the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    known = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) == 1 and known > 0 and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if min(sizes) < 1 or math.prod(sizes) != len(devices):
        raise UserError(
            f"config.mesh is data={data}, fsdp={fsdp}, tensor={tensor}, which doesn't fit "
            f"{len(devices)} devices: the product must be {len(devices)}, and one axis may be -1"
        )
    # Places neighboring devices next to each other. An axis may span part of a TPU slice's side.
    array = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(array, AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: examples are split over data and fsdp."""
    return NamedSharding(mesh, BATCH)


def num_shards(mesh: Mesh) -> int:
    """Returns the number of shards a batch is split into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, P())


def check_batch_size(batch_size: int, accum_steps: int, mesh: Mesh) -> None:
    """Raises UserError if a batch can't be split evenly over devices and microbatches."""
    shards = num_shards(mesh)
    if accum_steps < 1 or batch_size < 1 or batch_size % (shards * accum_steps):
        unit = shards * max(accum_steps, 1)
        nearest = max(round(batch_size / unit), 1) * unit
        raise UserError(
            f"config.batch_size {batch_size} is not divisible by {shards} devices x "
            f"{accum_steps} accumulation steps: use {nearest}, or change config.accum_steps"
        )
