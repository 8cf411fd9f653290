"""One mesh for a laptop and a pod, and the table that says which device holds what."""

import collections
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vit_jax.errors import UserError
from vit_jax.flops import num_bytes_on_device
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
    # Near devices next to each other; an axis may be a part of a TPU slice's side.
    near = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(near, AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)


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


def on_mesh(function: Callable, mesh: Mesh) -> Callable:
    """`function`, to be compiled for this mesh: `examples_split` and `placed` see it."""

    @functools.wraps(function)
    def traced(*args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return traced


def examples_split(x):
    """Activations (N, ...) split over the devices as the batch is; as they are, without a mesh.

    Left alone, the compiler may split them as the parameters lie (FSDP's axis) instead: each
    device then works on every example, and on a slice of the width.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.axis_names != AXES:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, BATCH))


def placed(tree):
    """Parameters, or what is of their shapes, split by the table; as they are, without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.axis_names != AXES:
        return tree
    return jax.lax.with_sharding_constraint(tree, state_sharding(tree, mesh))


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
        axis if axis and mesh.shape[axis] > 1 and size % mesh.shape[axis] == 0 else None
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
        on_device = num_bytes_on_device(leaf)
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


def batch_shapes(batch_size: int, image_shape, mesh: Mesh, with_mask: bool = False) -> dict:
    """A batch's shapes and shardings: what a step is compiled for before data comes.

    image_shape: (H, W, C). with_mask: as in evaluation.
    """
    sharding = batch_sharding(mesh)
    fields = {"images": (image_shape, jnp.uint8), "labels": ((), jnp.int32)}
    if with_mask:
        fields["mask"] = ((), jnp.bool_)
    return {
        name: jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=sharding)
        for name, (shape, dtype) in fields.items()
    }


def compile_step(train_step, state, batch):
    """`train_step` compiled for these shapes; the next state takes over the memory of the last."""
    where = jax.tree.map(lambda leaf: leaf.sharding, state)
    return compiled(train_step, state, batch, donate_argnums=0, out_shardings=(where, None))


# XLA can interleave a product with the gathering of its split parameter, piece by piece, and by
# itself does where arrays are large. Gathering it whole, one product ahead, takes half the time:
# 0.48 s a step for 0.94 s, by the compiler's estimate for H/14 on a v5e:4x4 with fsdp=16.
TPU_OPTIONS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}


def compiled(function: Callable, *shapes, **jit_options):
    """`function` compiled for arguments of these shapes, and for the mesh of their shardings."""
    mesh = jax.tree.leaves(shapes)[0].sharding.mesh
    options = TPU_OPTIONS if mesh.devices.flat[0].platform == "tpu" else None
    lowered = jax.jit(on_mesh(function, mesh), **jit_options).lower(*shapes)
    return lowered.compile(compiler_options=options)


AHEAD = 2  # batches on their way to the devices while one is computed on


def feeding(mesh: Mesh, batch_size: int) -> dict:
    """What of each batch this process loads, as `input_pipeline.train_batches` takes it.

    Processes whose devices hold the same examples (tensor parallelism across hosts) load the same
    ones. On a TPU slice the rows needn't be next to each other: the mesh follows the torus.

    Returns:
        {process_index, process_count: of those that load different examples; rows: int (n,)}.

    Raises:
        UserError: processes would share a part of their examples.
    """
    parts = collections.defaultdict(set)
    places = batch_sharding(mesh).devices_indices_map((batch_size,))
    for device, (rows,) in places.items():
        parts[device.process_index].update(range(*rows.indices(batch_size)))
    parts = {process: tuple(sorted(rows)) for process, rows in parts.items()}
    distinct = sorted(set(parts.values()))
    if sum(map(len, distinct)) != batch_size or len(set(map(len, distinct))) > 1:
        raise UserError(
            f"config.mesh.tensor {mesh.shape['tensor']} doesn't share out over the processes: "
            "take one that divides the devices of a process, or that it divides"
        )
    mine = parts[jax.process_index()]
    return dict(
        process_index=distinct.index(mine), process_count=len(distinct), rows=np.array(mine)
    )


def to_devices(batches: Iterable[dict], mesh: Mesh, ahead: int = AHEAD) -> Iterator[dict]:
    """This process's batches of NumPy arrays -> global arrays, sharded over their first axis.

    Transfers are asynchronous; `ahead` batches are on their way while one is computed on.
    """
    sharding = batch_sharding(mesh)
    parts = feeding(mesh, num_shards(mesh))["process_count"]
    queue = collections.deque()
    batches = iter(batches)

    def put(array):
        shape = (parts * len(array), *array.shape[1:])
        return jax.make_array_from_process_local_data(sharding, array, shape)

    def enqueue(count):
        for batch in itertools.islice(batches, count):
            queue.append(jax.tree.map(put, batch))

    enqueue(ahead)
    while queue:
        enqueue(1)
        yield queue.popleft()
