"""TPU slices that aren't here: their devices, to compile for, and what their chips can do."""

import dataclasses
import importlib.util
import os
import re

import jax
import numpy as np
from jax.experimental import topologies

from vit_jax.errors import UserError, first_line


@dataclasses.dataclass(frozen=True)
class Chip:
    """Of cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}, a second and a chip, unless said otherwise.

    memory: bytes that the compiler lets a program have (libtpu 0.0.52).

    flops: bfloat16. cycle_flops: the same in a cycle, of 128 x 128 multipliers (two operations
    each): 8 of them on v4 and v5p, 4 on v5e, 16 on v6e, which has theirs in larger units.
    link_bytes: of a link, one way: the published bandwidth of all, both ways, shared out.
    dimensions: of the torus. wraps: sides of a slice that are multiples of it close to a ring; in
    three dimensions, where all are.
    """

    flops: float
    cycle_flops: int
    memory: int
    link_bytes: float
    dimensions: int
    wraps: int
    options: dict

    @property
    def hertz(self) -> float:
        return self.flops / self.cycle_flops


UNIT = 2 * 128 * 128
MEGACORE = {"chip_config_name": "megacore"}  # a chip's two cores as one device, as it is used
CHIPS = {
    "v4": Chip(275e12, 8 * UNIT, int(30.75 * 2**30), 50e9, 3, 4, MEGACORE),
    "v5e": Chip(197e12, 4 * UNIT, int(15.75 * 2**30), 50e9, 2, 16, {}),
    "v5p": Chip(459e12, 8 * UNIT, int(95.73 * 2**30), 100e9, 3, 4, MEGACORE),
    "v6e": Chip(918e12, 16 * UNIT, int(31.24 * 2**30), 100e9, 2, 16, {}),
}


class Slice:
    """A described slice.

    Attributes:
        name: such as "v5e:16x16"; chip: a `Chip`; sides: of the slice, in chips.
        devices: for `sharding.create_mesh`; they compile, and compute nothing.
    """

    def __init__(self, name: str):
        """Needs libtpu, and no TPU.

        Raises:
            UserError: no such slice, or no libtpu.
        """
        kind, _, sides = name.partition(":")
        expected = "it can be KIND:SIDES such as v5e:4x4, v6e:16x16, v4:2x2x4 or v5p:4x4x8"
        if kind not in CHIPS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sides):
            raise UserError(f"--compile_for={name}: {expected}, with a kind of {', '.join(CHIPS)}")
        self.name, self.chip = name, CHIPS[kind]
        self.sides = tuple(int(side) for side in sides.split("x"))
        if len(self.sides) != self.chip.dimensions:
            raise UserError(
                f"--compile_for={name}: {kind} has {self.chip.dimensions} dimensions; {expected}"
            )
        before = {variable: os.environ.get(variable) for variable in QUIET}
        os.environ.update(QUIET)
        try:
            description = topologies.get_topology_desc(
                platform="tpu", topology_name=name, **self.chip.options
            )
        except (RuntimeError, ValueError, ImportError, NotImplementedError) as error:
            if importlib.util.find_spec("libtpu") is None:
                raise UserError(
                    f"--compile_for={name} needs the TPU's compiler: "
                    f"pip install 'jax[tpu]=={jax.__version__}'"
                ) from None
            raise UserError(f"--compile_for={name}: {first_line(error)}; {expected}") from None
        finally:
            for variable, value in before.items():
                os.environ.pop(variable)
                if value is not None:
                    os.environ[variable] = value
        self.devices = description.devices

    def wire_seconds(self, mesh, axes: tuple[str, ...], sent_bytes: int, one_way: bool) -> float:
        """How long a device's links are busy with what it sends in a collective over some axes.

        one_way: a permutation to a neighbour.
        """
        if not sent_bytes or not axes:
            return 0.0
        if one_way:
            return sent_bytes / self.chip.link_bytes
        first = tuple(slice(None) if axis in axes else 0 for axis in mesh.axis_names)
        places = [device.coords for device in np.ravel(mesh.devices[first])]
        return sent_bytes / bandwidth(self.chip, self.sides, places)


def bandwidth(chip: Chip, sides: tuple[int, ...], places) -> float:
    """Bytes a second that each device of a group can send to the others.

    Those along a side of the torus form a line, whose links carry one direction's share of what a
    ring's do; where groups lie between each other, they share links.

    places: of the group's devices on the torus, (devices, dimensions).
    """
    total = 0.0
    closed = [side % chip.wraps == 0 for side in sides]
    if chip.dimensions == 3:
        closed = [all(closed)] * 3
    for side, closes, at in zip(sides, closed, np.array(places).T, strict=False):
        along = np.unique(at)
        if len(along) > 1:
            step = int(np.diff(along).min())
            ring = len(along) * step == side and closes
            total += chip.link_bytes * (2 if ring else 1) / step
    return total


# libtpu looks for the machine's TPU, and asks Google Cloud about it, where it isn't told.
QUIET = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


def without_accelerator() -> None:
    """Keeps JAX to this machine's CPU: a compiler that is installed looks for its TPU otherwise."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # can't be read without a TPU
