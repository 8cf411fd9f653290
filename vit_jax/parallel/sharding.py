"""Which device holds what: the partition rules, and steps compiled for them."""

import collections
import functools
import math
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vit_jax.errors import UserError
from vit_jax.parallel.mesh import AXES, BATCH, batch_sharding
from vit_jax.paths import BLOCK_PARAMETERS, block_parameter, is_stacked, path_name


def state_sharding(state, mesh: Mesh):
    """Returns the sharding of each leaf of a train state, or of its shapes.

    Optimizer moments and the parameters' average have their parameter's name at the end of their
    path, and are sharded like it. The means that stand for a factored second moment (Adafactor's)
    are small: every device holds them whole.
    """

    def leaf_sharding(path, leaf):
        name = path_name(path)
        is_small = re.search(r"/v_(row|col)/", name)
        return NamedSharding(mesh, P() if is_small else partition(name, leaf.shape, mesh))

    return jax.tree.map_with_path(leaf_sharding, state)


def with_shardings(shapes, mesh: Mesh):
    """Returns the shapes of a state, or of parameters, with the sharding of each leaf."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        state_sharding(shapes, mesh),
    )


def shapes_of(arrays):
    """Returns a tree of arrays on a mesh as shapes with shardings."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), arrays
    )


def partition(name: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """Returns the PartitionSpec of one parameter.

    Tensor parallelism comes first, by the table `BLOCK_PARAMETERS` in `vit_jax/paths.py`. FSDP
    then splits the largest free axis that it divides, in arrays with two axes or more. The layer
    axis of stacked blocks is never split. An axis whose size the mesh axis doesn't divide stays
    whole.

    Raises:
        UserError: the mesh has tensor > 1, and the table has no row for a parameter of a block.
    """
    stacked = is_stacked(name)
    spec = [None] * len(shape)
    if mesh.shape["tensor"] > 1:
        rule = tensor_rule(name)
        if rule and len(shape) >= len(rule):
            spec[len(shape) - len(rule) :] = rule  # stacked blocks have a leading layer axis
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


def tensor_rule(name: str) -> tuple | None:
    """Returns the table's partition of a block's parameter; None for parameters outside blocks."""
    parameter = block_parameter(name)
    if parameter is None:
        return None
    if parameter not in BLOCK_PARAMETERS:
        raise UserError(
            f"{name}: the table BLOCK_PARAMETERS in vit_jax/paths.py has no row for {parameter}, "
            "so tensor parallelism can't split it: add one, or set config.mesh.tensor=1"
        )
    return BLOCK_PARAMETERS[parameter]


def with_mesh(function: Callable, mesh: Mesh) -> Callable:
    """Returns `function`, traced with a mesh that the functions below can see."""

    @functools.wraps(function)
    def traced(*args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return traced


def has_mesh() -> bool:
    """Whether a function is traced for a run's mesh, by `with_mesh`."""
    return jax.sharding.get_abstract_mesh().axis_names == AXES


def device_in_use():
    """Returns the device that is compiled for, with its `platform` and `device_kind`."""
    default = jax.config.jax_default_device or jax.devices()[0]
    default = jax.devices(default)[0] if isinstance(default, str) else default
    described = jax.sharding.get_abstract_mesh().abstract_device if has_mesh() else None
    # This machine's own device tells more.
    is_default = described is None or described.device_kind == default.device_kind
    return default if is_default else described


def shard_examples(x):
    """Constrains activations (N, ...) to the batch's sharding; the identity without a mesh.

    Without the constraint, the compiler may shard activations like the parameters (by FSDP's
    axis): each device then computes a slice of the width for every example.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.axis_names != AXES:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, BATCH))


def shard_like_params(tree):
    """Constrains gradients to the sharding of their parameters; the identity without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.axis_names != AXES:
        return tree
    return jax.lax.with_sharding_constraint(tree, state_sharding(tree, mesh))


def partition_table(params, mesh: Mesh) -> list[str]:
    """Returns lines of text: name, shape, partition and bytes per device of each parameter.

    Numbered blocks share a line. A line names the mesh axes that should split the parameter but
    divide none of its axes.

    Args:
        params: arrays, or shapes with shardings.
    """
    groups = collections.Counter()
    for path, leaf in jax.tree.leaves_with_path(params):
        name = re.sub(r"encoderblock_\d+", "encoderblock_*", path_name(path))
        on_device = num_bytes_on_device(leaf)
        groups[name, leaf.shape, tuple(leaf.sharding.spec), on_device] += 1
    rows = [("parameter", "shape", "partition", "bytes per device")]
    for (name, shape, spec, on_device), count in groups.items():
        times = f"{count} x " if count > 1 else ""
        axes = ", ".join(str(axis) for axis in spec if axis) or "replicated"
        if unused := undivided_axes(name, shape, spec, mesh):
            axes += f" ({unused} divides no axis)"
        rows.append((name, f"{times}{shape}", axes, f"{count * on_device:,}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def undivided_axes(name: str, shape: tuple[int, ...], spec: tuple, mesh: Mesh) -> str:
    """Returns the mesh axes that should split a parameter but divide none of its axes."""
    rule = BLOCK_PARAMETERS.get(block_parameter(name.replace("_*/", "_0/")))
    is_matrix = len(shape) - is_stacked(name) > 1
    intended = {"tensor": bool(rule and any(rule)), "fsdp": is_matrix}
    return " and ".join(
        axis for axis in intended if intended[axis] and mesh.shape[axis] > 1 and axis not in spec
    )


def num_bytes_on_device(tree) -> int:
    """Returns the bytes of a tree of sharded arrays (or shapes) that one device holds."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def batch_shapes(
    batch_size: int,
    image_shape,
    mesh: Mesh,
    for_evaluation: bool = False,
    label_shape: tuple[int, ...] = (),
) -> dict:
    """Returns a global batch's shapes with shardings, to compile a step for.

    Args:
        image_shape: (H, W, C).
        for_evaluation: whether to include the mask and the indices of an evaluation batch.
        label_shape: of the label of an example.
    """
    sharding = batch_sharding(mesh)
    fields = {"images": (image_shape, jnp.uint8), "labels": (label_shape, jnp.int32)}
    if for_evaluation:
        fields |= {"index": ((), jnp.int32), "mask": ((), jnp.bool_)}
    return {
        name: jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=sharding)
        for name, (shape, dtype) in fields.items()
    }


def compile_train_step(train_step: Callable, state, batch):
    """Compiles (state, batch) -> (state, metrics) for these shapes; donates the state."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    return compile_for_shapes(
        train_step, state, batch, donate_argnums=0, out_shardings=(shardings, None)
    )


# By default XLA interleaves large matrix products with the gathering of their sharded operand.
# Gathering the whole operand, one product ahead, takes half the time: 0.48 s a step instead of
# 0.94 s (the compiler's estimate for H/14 on v5e:4x4 with fsdp=16).
TPU_OPTIONS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}


def compile_for_shapes(function: Callable, *shapes, **jit_options):
    """Compiles a function for arguments of these shapes, on the mesh of their shardings."""
    mesh = jax.tree.leaves(shapes)[0].sharding.mesh
    options = TPU_OPTIONS if mesh.devices.flat[0].platform == "tpu" else None
    lowered = jax.jit(with_mesh(function, mesh), **jit_options).lower(*shapes)
    return lowered.compile(compiler_options=options)
