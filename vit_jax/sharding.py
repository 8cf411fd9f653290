"""One mesh for a laptop and a pod, and the table that says which device holds what."""

import collections
import itertools
import math
import re
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vit_jax.errors import UserError
from vit_jax.paths import path_name

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))

# Tensor parallelism: heads and MLP units are split, each device holding whole ones, so that a
# block needs one sum over devices after attention and one after the MLP (arXiv:1909.08053).
TENSOR_RULES = (
    (r"MultiHeadDotProductAttention_\d+/(query|key|value)/kernel$", P(None, "tensor", None)),
    (r"MultiHeadDotProductAttention_\d+/(query|key|value)/bias$", P("tensor", None)),
    (r"MultiHeadDotProductAttention_\d+/out/kernel$", P("tensor", None, None)),
    (r"MlpBlock_\d+/Dense_0/kernel$", P(None, "tensor")),
    (r"MlpBlock_\d+/Dense_0/bias$", P("tensor")),
    (r"MlpBlock_\d+/Dense_1/kernel$", P("tensor", None)),
)


def create_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices=None) -> Mesh:
    """A mesh with axes data, fsdp and tensor over all devices; one of them may be -1: the rest.

    Raises UserError where the product isn't the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    known = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) == 1 and known > 0 and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if min(sizes) < 1 or math.prod(sizes) != len(devices):
        raise UserError(
            f"config.mesh data={data}, fsdp={fsdp}, tensor={tensor} doesn't fit the "
            f"{len(devices)} devices here: the product must be {len(devices)}, one axis may be -1"
        )
    return jax.make_mesh(sizes, AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3, devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Examples are split over data and fsdp."""
    return NamedSharding(mesh, BATCH)


def num_shards(mesh: Mesh) -> int:
    """How many parts a batch is split into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def state_sharding(state, mesh: Mesh):
    """The sharding of each leaf of a train state (or of its shapes).

    Optimizer moments and the EMA lie under their parameter's path and are placed alike.
    """

    def place(path, leaf):
        return NamedSharding(mesh, partition(path_name(path), leaf.shape, mesh))

    return jax.tree.map_with_path(place, state)


def partition(name: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """The table's word on one array: tensor rules by name, then FSDP on what is left.

    An axis that the mesh doesn't divide stays whole. FSDP takes the largest free axis that it
    divides, of arrays with two axes or more; the layer axis of stacked blocks doesn't count.
    """
    stacked = "encoderblock/" in name
    spec = [None] * len(shape)
    for pattern, rule in TENSOR_RULES:
        if re.search(pattern, name) and len(shape) >= len(rule):
            spec[len(shape) - len(rule) :] = rule  # stacked blocks have a layer axis in front
    spec = [
        axis if axis and size % mesh.shape[axis] == 0 else None
        for axis, size in zip(spec, shape, strict=True)
    ]
    fsdp = mesh.shape["fsdp"]
    free = [i for i, axis in enumerate(spec) if axis is None and shape[i] % fsdp == 0]
    free = [i for i in free if i >= stacked]
    if fsdp > 1 and len(shape) - stacked > 1 and free:
        spec[max(free, key=lambda i: shape[i])] = "fsdp"
    return P(*spec)


def table(params, mesh: Mesh) -> list[str]:
    """A line for each group of alike parameters: name, shape, partition, bytes on a device.

    A group that stays whole because the mesh divides none of its axes says so. params: arrays, or
    shapes with shardings.
    """
    groups = collections.Counter()
    for path, leaf in jax.tree.leaves_with_path(params):
        name = re.sub(r"encoderblock_\d+", "encoderblock_*", path_name(path))
        on_device = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        groups[name, leaf.shape, tuple(leaf.sharding.spec), on_device] += 1
    rows = [("parameter", "shape", "partition", "bytes a device")]
    for (name, shape, spec, on_device), count in groups.items():
        times = f"{count} x " if count > 1 else ""
        axes = ", ".join(str(axis) for axis in spec if axis) or "whole"
        if lacking := undivided(name, shape, spec, mesh):
            axes += f" ({lacking} divides no axis)"
        rows.append((name, f"{times}{shape}", axes, f"{count * on_device:,}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def undivided(name: str, shape: tuple[int, ...], spec: tuple, mesh: Mesh) -> str:
    """The axes of the mesh that the table of rules meant for a parameter and that don't fit it."""
    ruled = any(re.search(pattern, name) for pattern, _ in TENSOR_RULES)
    matrix = len(shape) - ("encoderblock/" in name) > 1
    meant = {"tensor": ruled, "fsdp": matrix}
    return " and ".join(
        axis for axis in meant if meant[axis] and mesh.shape[axis] > 1 and axis not in spec
    )


def batch_shapes(batch_size: int, image_shape: tuple[int, int, int], mesh: Mesh) -> dict:
    """A training batch's shapes and shardings: what a step is compiled for before data comes."""
    sharding = batch_sharding(mesh)
    return {
        "images": jax.ShapeDtypeStruct((batch_size, *image_shape), jnp.uint8, sharding=sharding),
        "labels": jax.ShapeDtypeStruct((batch_size,), jnp.int32, sharding=sharding),
    }


def compile_step(train_step, state, batch):
    """`train_step` compiled for these shapes; the next state takes over the memory of the last."""
    where = jax.tree.map(lambda leaf: leaf.sharding, state)
    return (
        jax.jit(train_step, donate_argnums=0, out_shardings=(where, None))
        .lower(state, batch)
        .compile()
    )


def to_devices(batches: Iterable[dict], mesh: Mesh, ahead: int = 2) -> Iterator[dict]:
    """This process's batches of NumPy arrays -> global arrays, sharded over their first axis.

    Transfers are asynchronous; `ahead` batches are on their way while one is computed on.
    """
    sharding = batch_sharding(mesh)
    queue = collections.deque()
    batches = iter(batches)

    def enqueue(count):
        for batch in itertools.islice(batches, count):
            put = jax.make_array_from_process_local_data
            queue.append({name: put(sharding, array) for name, array in batch.items()})

    enqueue(ahead)
    while queue:
        enqueue(1)
        yield queue.popleft()
