"""The device mesh, and how batches are split over its axes."""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vit_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))  # the partition of a batch's first axis


def create_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    slices: int | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Creates a mesh with the axes data, fsdp and tensor.

    Several slices (groups of devices with fast links inside each) split `data` alone: its first
    `data / slices` positions are the first slice, and so on. FSDP and tensor parallelism then stay
    inside a slice, and each slice holds a whole copy of the state.

    Args:
        data, fsdp, tensor: the size of each axis; at most one may be -1, which takes the devices
            that the other two leave.
        slices: the number of slices; None: as many as the devices' `slice_index` tells, which
            are TPU slices, or hosts with GPUs. Over hosts whose GPUs the other axes don't fit,
            the mesh is laid as over one slice.
        devices: the devices to use; None: all of them.

    Raises:
        UserError: the product of the sizes isn't the number of devices, or the slices don't fit it.
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
    slices = check_slices(slices, sizes, devices)
    array = place_devices(sizes, slices, devices)
    return Mesh(array, AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)


def check_slices(slices: int | None, sizes: list[int], devices: Sequence[jax.Device]) -> int:
    """Returns the number of slices that the mesh is laid over; see `create_mesh`.

    Raises:
        UserError: the slices aren't those of the TPUs, or `data` isn't a multiple of them.
    """
    present = count_slices(devices)
    is_tpu = devices[0].platform == "tpu"
    if slices is None:
        fits = sizes[0] % present == 0
        slices = present if fits or is_tpu else 1
    elif is_tpu and slices != present:
        raise UserError(
            f"config.mesh.slices is {slices}, but the TPUs are {counted(present, 'slice')}: leave "
            "it unset"
        )
    if slices < 1 or sizes[0] % slices:
        axes = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
        raise UserError(
            f"config.mesh.slices is {slices}, which doesn't fit {axes} on {len(devices)} devices: "
            "data must be a multiple of it, since fsdp and tensor stay inside a slice"
        )
    return slices


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def count_slices(devices: Sequence[jax.Device]) -> int:
    """Returns how many slices the devices are in; CPUs, which have no `slice_index`, are in one."""
    return len({getattr(device, "slice_index", 0) for device in devices})


def place_devices(sizes: list[int], slices: int, devices: Sequence[jax.Device]) -> np.ndarray:
    """Arranges devices so that neighbors on an axis are close to each other."""
    # An axis may span part of a TPU slice's side.
    options = dict(allow_split_physical_axes=True)
    if slices == 1:
        return mesh_utils.create_device_mesh(sizes, devices, **options)
    in_slice, over_slices = [sizes[0] // slices, *sizes[1:]], [slices, 1, 1]
    if slices == count_slices(devices):
        return mesh_utils.create_hybrid_device_mesh(in_slice, over_slices, devices, **options)
    # JAX's own needs a `slice_index`.
    groups = np.split(np.array(devices), slices)
    return np.concatenate(
        [mesh_utils.create_device_mesh(in_slice, list(group), **options) for group in groups]
    )


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
