"""Parses the text of a compiled program: XLA's scheduled HLO."""

import dataclasses
import math
import re
from collections.abc import Callable

import numpy as np

from vit_jax.errors import UserError

ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}
ITEM_BYTES |= {"f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8}

ARRAY_TYPE = re.compile(r"(\w+)\[([\d,]*)\](\{[^{}]*\})?")
# The type of the result ends in a bracket, and nothing inside it looks like " name(".
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.+?[\]})]) ([a-z][a-z0-9\-]*)\((.*)$")
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation: `%name = type opcode(operands), attributes`.

    Attributes:
        name: unique within the computation.
        type: the type of the result, as text; a tuple's lists several arrays.
        opcode: such as "fusion".
        operands: the names of the instructions whose results it takes.
        text: everything after the opening parenthesis: operands and attributes.
    """

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    text: str

    @property
    def called(self) -> str | None:
        """The name of the computation that it calls, such as a loop's body."""
        match = re.search(r"(?:calls|body|to_apply|called_computations)=\{?%?([\w.\-]+)", self.text)
        return match[1] if match else None

    @property
    def estimated_cycles(self) -> int:
        """The compiler's estimate; 0 if it has none."""
        match = re.search(r'"estimated_cycles":"(\d+)"', self.text)
        return int(match[1]) if match else 0

    @property
    def channel(self) -> str | None:
        """The number that the parts of one collective have in common."""
        match = re.search(r"channel_id=(\d+)", self.text)
        return match[1] if match else None

    @property
    def value(self) -> int | None:
        """The value of an integer constant; None for anything else."""
        match = re.match(r"\d+", self.text)
        return int(match[0]) if self.opcode == "constant" and match else None


class Module:
    """A compiled program.

    Attributes:
        computations: {name: {name: Instruction}}, instructions in the order they run.
        entry: the name of the computation that the program starts with.
    """

    def __init__(self, text: str):
        """Parses what `jax.stages.Compiled.as_text()` returns."""
        self.computations, self.entry = {}, None
        current = None
        for line in text.splitlines():
            if header := COMPUTATION.match(line):
                current = self.computations[header[2]] = {}
                self.entry = header[2] if header[1] else self.entry
            elif (match := INSTRUCTION.match(line)) and current is not None:
                name, result_type, opcode, rest = match.groups()
                operands = re.match(r"[^()]*", re.sub(r"/\*.*?\*/", "", rest))[0]
                operands = tuple(re.findall(r"%([\w.\-]+)", operands))
                current[name] = Instruction(name, result_type, opcode, operands, rest)

    def trip_count(self, loop: Instruction) -> int:
        """Returns how often a loop runs that counts from 0 to a constant, by a constant.

        Raises:
            UserError: the loop has another form.
        """
        if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.text):
            return int(known[1])
        condition_name = re.search(r"condition=%?([\w.\-]+)", loop.text)[1]
        condition, body = self.computations[condition_name], self.computations[loop.called]
        limits = [op.value for op in condition.values() if op.value is not None]
        counters = [op for op in condition.values() if op.opcode == "get-tuple-element"]
        if len(limits) == len(counters) == 1:
            index = int(re.search(r"index=(\d+)", counters[0].text)[1])
            body_result = body[next(reversed(body))]
            increment = body.get(body_result.operands[index])
            names = increment.operands if increment and increment.opcode == "add" else ()
            if steps := [body[name].value for name in names if body[name].value]:
                return limits[0] // steps[0]
        raise UserError(
            f"The number of iterations of the loop {loop.name} can't be read from the compiled "
            "program: use the versions of jax and libtpu named in docs/pods.md"
        )


def array_bytes(type_text: str, has_layout: Callable = lambda layout: True) -> int:
    """Returns the bytes of the arrays in a type, or of those whose layout passes `has_layout`."""
    return sum(
        ITEM_BYTES.get(dtype, 0) * math.prod(int(n) for n in dims.split(",") if n)
        for dtype, dims, layout in ARRAY_TYPE.findall(type_text)
        if has_layout(layout)
    )


def main_memory_bytes(type_text: str) -> int:
    """Returns the bytes of the arrays in main memory; the layout of others names theirs, S(1)."""
    return array_bytes(type_text, lambda layout: "S(" not in layout)


def array_shape(type_text: str) -> list[int]:
    """Returns the shape of the first array in a type."""
    return [int(n) for n in ARRAY_TYPE.search(type_text)[2].split(",") if n]


def device_pairs(text: str) -> list[list[int]]:
    """Returns the (source, target) pairs of a permutation; [] for other collectives."""
    pairs = re.search(r"source_target_pairs=\{(.*?\})\}", text)
    return [
        [int(i) for i in pair] for pair in re.findall(r"(\d+),(\d+)", pairs[1] if pairs else "")
    ]


def host_transfer(text: str) -> str | None:
    """Returns the kind of a collective between TPU slices, such as "all-reduce".

    The compiler writes it as a pair of `send` and `recv` with this machine's host, whose runtime
    reaches the other slices. None if the instruction isn't one.

    Args:
        text: of the instruction.
    """
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', text)
    return kind[1].lower().replace("_", "-") if kind else None


def device_group(text: str, num_devices: int) -> list[int]:
    """Returns one group of devices that take part in a collective together.

    Args:
        text: of the collective's instruction.
        num_devices: the size of the mesh.

    Returns:
        The device numbers of the first group; of a permutation, its first pair.
    """
    if match := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", text):
        return [int(match[1]), int(match[2])]
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return [int(i) for i in match[1].split(",")]
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", text):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
        group_axes = re.findall(r"'(\w+)'", match[2])
        ids = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        first = tuple(slice(None) if name in group_axes else 0 for name in sizes)
        return ids[first].ravel().tolist()
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, source, order = (
            [int(n) for n in part.split(",")] if part else None for part in match.groups()
        )
        ids = np.arange(math.prod(source)).reshape(source)
        ids = ids.transpose(order) if order else ids
        return ids.reshape(shape)[0].ravel().tolist()
    return list(range(num_devices))
