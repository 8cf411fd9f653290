"""Descriptions of machines to compile for: TPU slices here, GPUs in `gpu`."""

import contextlib
import dataclasses
import importlib.util
import math
import os
import re

import jax
import numpy as np
from jax.experimental import topologies

from vit_jax.aot.gpu import CARDS, GPUS_PER_HOST, Card, Gpus
from vit_jax.errors import UserError, first_line


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of TPU chip. The figures are from cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}.

    Attributes:
        kinds: the names that JAX gives its devices, as `device_kind`.
        flops: bfloat16 operations per second.
        flops_per_cycle: bfloat16 operations per cycle: those of its matrix units.
        memory_bytes: what the compiler lets a program use (measured with libtpu 0.0.52).
        memory_bandwidth: bytes per second.
        link_bandwidth: bytes per second that one link carries in one direction: the published
            bandwidth, which adds both directions of all links, divided by their number.
        num_dimensions: of the torus that connects the chips of a slice.
        dcn_bandwidth: bytes per second that the data center's network carries from a chip to other
            slices: the published bandwidth of a pod divided by its chips (v5e, v6e), or of a chip
            (v5p); v4's isn't published, and v5p's stands for it.
        ring_multiple: a side of a slice whose length is a multiple of this closes to a ring; in
            three dimensions only if all sides are.
        topology_options: further arguments for JAX's description of a slice.
    """

    kinds: tuple[str, ...]
    flops: float
    flops_per_cycle: int
    memory_bytes: int
    memory_bandwidth: float
    link_bandwidth: float
    dcn_bandwidth: float
    num_dimensions: int
    ring_multiple: int
    topology_options: dict

    @property
    def cycles_per_second(self) -> float:
        return self.flops / self.flops_per_cycle

    @property
    def num_cores(self) -> int:
        return 2 if self.topology_options == MEGACORE else 1


# A matrix unit (MXU) does 128 x 128 multiplications and additions per cycle. v6e has larger
# ones, which do as much as 16 of these.
MXU = 2 * 128 * 128
MEGACORE = {"chip_config_name": "megacore"}  # a chip's two cores act as one device
CHIPS = {
    "v4": Chip(
        ("TPU v4",), 275e12, 8 * MXU, int(30.75 * 2**30), 1228e9, 50e9, 6.25e9, 3, 4, MEGACORE
    ),
    "v5e": Chip(
        ("TPU v5 lite", "TPU v5e"),
        *(197e12, 4 * MXU, int(15.75 * 2**30), 819e9, 50e9, 3.125e9, 2, 16, {}),
    ),
    "v5p": Chip(
        ("TPU v5", "TPU v5p"),
        *(459e12, 8 * MXU, int(95.73 * 2**30), 2765e9, 100e9, 6.25e9, 3, 4, MEGACORE),
    ),
    "v6e": Chip(
        ("TPU v6 lite", "TPU v6e"),
        *(918e12, 16 * MXU, int(31.24 * 2**30), 1640e9, 100e9, 12.5e9, 2, 16, {}),
    ),
}


def peak_flops(device, dtype) -> float | None:
    """Returns the published peak of a device's matrix products, operations per second.

    Args:
        device: a device of JAX, or its description.
        dtype: "bfloat16" or "float32", with full precision.

    Returns:
        The peak; None if it isn't known, as of a CPU.
    """
    kind, is_bfloat16 = device.device_kind, jax.numpy.dtype(dtype) == jax.numpy.bfloat16
    if chip := next((chip for chip in CHIPS.values() if kind in chip.kinds), None):
        return chip.flops if is_bfloat16 else None
    card = next((card for card in CARDS.values() if card.kind == kind), None)
    return card and card.flops["bf16" if is_bfloat16 else "f32"]


# Without these libtpu looks for this machine's TPU, and asks Google Cloud about it.
LIBTPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


class Slice:
    """A TPU slice, or several like it, described rather than present.

    Attributes:
        name: such as "v5e:16x16", or "v5e:16x16x2" for two of these.
        chip: its kind of chip.
        shape: a slice's sides in chips, such as (16, 16).
        num_slices: how many there are.
        one_slice: the name of one of them.
        devices: for `create_mesh`; programs can be compiled for them, but not run.
        packages: the packages whose versions determine the compiled program.
        compiler_threads: how many programs to compile at once.
    """

    packages = ("jax", "libtpu")
    groups = "slices"  # what the slow links are between
    compiler_threads = 1

    def __init__(self, name: str):
        """Describes a slice; requires libtpu, but no TPU.

        Raises:
            UserError: there is no such slice, or libtpu isn't installed.
        """
        self.name = name
        self.chip, sides = parse_name(name)
        self.shape, more = sides[: self.chip.num_dimensions], sides[self.chip.num_dimensions :]
        self.num_slices = math.prod(more)
        self.one_slice = f"{name.partition(':')[0]}:{'x'.join(map(str, self.shape))}"
        # One slice is described without the option, and has no `slice_index` other than 0.
        several = dict(num_slices=self.num_slices) if self.num_slices > 1 else {}
        try:
            with environment_variables(LIBTPU_ENVIRONMENT):
                description = topologies.get_topology_desc(
                    platform="tpu",
                    topology_name=self.one_slice,
                    **self.chip.topology_options,
                    **several,
                )
        except (RuntimeError, ValueError, ImportError, NotImplementedError) as error:
            if importlib.util.find_spec("libtpu") is None:
                raise UserError(
                    f"--compile_for={name} requires the TPU's compiler: "
                    f"pip install 'jax[tpu]=={jax.__version__}'"
                ) from None
            raise UserError(
                f"--compile_for={name} isn't a slice that libtpu knows: {first_line(error)}"
            ) from None
        self.devices = description.devices

    @property
    def memory_bytes(self) -> int:
        return self.chip.memory_bytes

    def environment(self, required: int) -> dict[str, str]:
        """Returns the environment variables that a run needs to have so many bytes per chip."""
        return {}

    def wire_seconds(
        self, mesh, axes: tuple[str, ...], bytes_sent: int, one_way: bool, crosses: bool = False
    ) -> float:
        """Returns how long a collective keeps a device's links busy.

        Args:
            mesh: a mesh over the devices.
            axes: the mesh axes that the collective spans.
            bytes_sent: by each device.
            one_way: whether each device sends to one neighbor only (a permutation).
            crosses: whether it is between slices.
        """
        if crosses:
            return bytes_sent / self.chip.dcn_bandwidth
        if not bytes_sent or not axes:
            return 0.0
        if one_way:
            return bytes_sent / self.chip.link_bandwidth
        group = tuple(slice(None) if axis in axes else 0 for axis in mesh.axis_names)
        # Every slice has the same coordinates.
        coordinates = [device.coords for device in np.ravel(mesh.devices[group])]
        return bytes_sent / group_bandwidth(self.chip, self.shape, coordinates)


def create(name: str) -> Slice | Gpus:
    """Describes the TPU slice or the GPUs of this name.

    Raises:
        UserError: there is no such machine, or the compiler for it isn't installed.
    """
    model, shape = parse_name(name)
    return Gpus(name, model, shape) if isinstance(model, Card) else Slice(name)


def parse_name(name: str) -> tuple[Chip | Card, tuple[int, ...]]:
    """Returns the chip and the sides of a TPU slice, or the card and the number of GPUs.

    One number more than the slice has sides is the number of slices. GPUs are (GPUs,) of one host,
    or (hosts, GPUs per host).

    Raises:
        UserError: the name is neither KIND:SIDES nor CARD:GPUS.
    """
    kind, _, sides = name.partition(":")
    shape = ()
    if re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sides):
        shape = tuple(int(side) for side in sides.split("x"))
    if kind in CHIPS and len(shape) - CHIPS[kind].num_dimensions in (0, 1):
        return CHIPS[kind], shape
    is_one_host = len(shape) == 1 and shape[0] <= GPUS_PER_HOST
    if kind in CARDS and (is_one_host or (len(shape) == 2 and shape[1] == GPUS_PER_HOST)):
        return CARDS[kind], shape
    if kind in CHIPS and shape:
        example = f"{kind}:{'x'.join(['4'] * CHIPS[kind].num_dimensions)}"
        raise UserError(
            f"--compile_for is {name!r}; a slice of {kind} must have {CHIPS[kind].num_dimensions} "
            f"sides, such as {example}, or {example}x2 for two slices"
        )
    raise UserError(
        f"--compile_for is {name!r}; it must be a TPU slice, KIND:SIDES with a kind of "
        f"{', '.join(CHIPS)}, such as v5e:4x4 or v4:2x2x4; or GPUs, CARD:NUMBER with a card of "
        f"{', '.join(CARDS)} and up to {GPUS_PER_HOST} on a host, such as h100:8, or h100:4x8 for "
        "four hosts of eight"
    )


@contextlib.contextmanager
def environment_variables(variables: dict[str, str]):
    """Sets environment variables inside the block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def group_bandwidth(chip: Chip, slice_shape: tuple[int, ...], coordinates) -> float:
    """Returns the bytes per second that each device of a group can send to the others.

    Devices along a side of the torus form a line, which carries half of what a ring does. Groups
    that lie between one another share links.

    Args:
        chip: the kind of chip.
        slice_shape: the slice's sides in chips.
        coordinates: of the group's devices on the torus, int (devices, num_dimensions).
    """
    total = 0.0
    closed = [side % chip.ring_multiple == 0 for side in slice_shape]
    if chip.num_dimensions == 3:
        closed = [all(closed)] * 3
    # Coordinates may have a third component where the torus has two dimensions.
    for side, is_closed, along in zip(slice_shape, closed, np.array(coordinates).T, strict=False):
        positions = np.unique(along)
        if len(positions) > 1:
            stride = int(np.diff(positions).min())
            is_ring = is_closed and len(positions) * stride == side
            total += chip.link_bandwidth * (2 if is_ring else 1) / stride
    return total


def use_cpu() -> None:
    """Restricts JAX to this machine's CPU, whatever accelerator it is installed for."""
    jax.config.update("jax_platforms", "cpu")
    # The plugin for GPUs would refuse to load without the driver.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    # There is no GPU to time kernels on. Without this XLA takes almost twice as long to compile for
    # one, and chooses the same kernels.
    os.environ["XLA_FLAGS"] = f"--xla_gpu_autotune_level=0 {os.environ.get('XLA_FLAGS', '')}"
    # Programs compiled for an accelerator can't be read back from the cache without one.
    jax.config.update("jax_enable_compilation_cache", False)
