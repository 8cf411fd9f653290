"""What one device does in a compiled program, read from its text: XLA's scheduled HLO.

XLA's own summary (`compiled.cost_analysis()`) counts the body of a loop once, and knows neither
collectives nor time. Here loops count as often as they run.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Callable

import numpy as np

from vit_jax.errors import UserError

ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}
ITEM_BYTES |= {"f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^{}]*\})?")
# The result's type ends in a bracket, and nothing inside it looks like " name(".
OPERATION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.+?[\]})]) ([a-z][a-z0-9\-]*)\((.*)$")
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")


@dataclasses.dataclass(frozen=True)
class Operation:
    """One instruction: its result's type and kind, its operands' names, and the rest as text."""

    name: str
    type: str
    kind: str
    operands: tuple[str, ...]
    text: str

    @property
    def called(self) -> str | None:
        match = re.search(r"(?:calls|body|to_apply|called_computations)=\{?%?([\w.\-]+)", self.text)
        return match[1] if match else None

    @property
    def cycles(self) -> int:
        """The compiler's estimate."""
        match = re.search(r'"estimated_cycles":"(\d+)"', self.text)
        return int(match[1]) if match else 0


@dataclasses.dataclass
class Cost:
    """Of one device. seconds: all of it; wire_seconds: of the links, hidden behind work or not.

    collectives: (kind, mesh axes) -> [how many, bytes sent].
    """

    cycles: int = 0
    flops: int = 0
    memory_bytes: int = 0
    seconds: float = 0.0
    wire_seconds: float = 0.0
    collectives: dict = dataclasses.field(
        default_factory=lambda: collections.defaultdict(lambda: [0, 0])
    )

    def add(self, other: "Cost", times: int = 1) -> None:
        for name in ("cycles", "flops", "memory_bytes", "seconds", "wire_seconds"):
            setattr(self, name, getattr(self, name) + times * getattr(other, name))
        for key, (count, size) in other.collectives.items():
            self.collectives[key][0] += times * count
            self.collectives[key][1] += times * size


class Module:
    """A program: computations by name, operations in the order they run."""

    def __init__(self, text: str):
        self.computations, self.entry = {}, None
        current = None
        for line in text.splitlines():
            if header := COMPUTATION.match(line):
                current = self.computations[header[2]] = {}
                self.entry = header[2] if header[1] else self.entry
            elif (match := OPERATION.match(line)) and current is not None:
                operands = re.match(r"[^()]*", re.sub(r"/\*.*?\*/", "", match[4]))[0]
                names = re.findall(r"%([\w.\-]+)", operands)
                current[match[1]] = Operation(match[1], match[2], match[3], tuple(names), match[4])

    def cost(self, sizes: dict[str, int], hertz: float, wire: Callable) -> Cost:
        """What the program costs one device.

        An operation takes the cycles that the compiler estimates. A collective takes `wire`'s
        seconds on links that carry one at a time; those that the compiler has split into a start
        and an end run beside what it has put between the two.

        Args:
            sizes: the mesh, {axis: size}, devices in row-major order.
            hertz: cycles a second.
            wire: (kind, axes, bytes) -> seconds.
        """
        return Walk(self, sizes, hertz, wire).computation(self.entry)


class Walk:
    """Goes through a module's operations as one device does."""

    def __init__(self, module: Module, sizes, hertz, wire):
        self.computations, self.sizes = module.computations, sizes
        self.hertz, self.wire = hertz, wire
        self.computation = functools.cache(self.computation)
        self.flops = functools.cache(self.flops)

    def computation(self, name: str) -> Cost:
        """The cost of a computation that is run: the entry, a loop's body."""
        operations, cost, clock = self.computations[name], Cost(), Clock()
        for op in operations.values():
            if op.kind in ("while", "call"):
                inner, times = self.computation(op.called), 1
                if op.kind == "while":
                    times = self.trips(op)
                cost.add(inner, times)
                clock.now += times * inner.seconds
                continue
            cost.cycles += op.cycles
            clock.now += op.cycles / self.hertz
            cost.memory_bytes += self.memory_bytes(op, operations)
            for kind, axes, size, mark in self.collectives(op, operations, clock.seen):
                seconds = 0.0
                if kind:
                    seconds = self.wire(kind, axes, size)
                    cost.wire_seconds += seconds
                    cost.collectives[kind, axes][0] += 1
                    cost.collectives[kind, axes][1] += size
                clock.collective(mark, seconds)
            cost.flops += self.flops(op.called) if op.called else product_flops(op, operations)
        cost.seconds = clock.end()
        return cost

    def trips(self, loop: Operation) -> int:
        """How often a loop runs: they count up from 0, by a constant, to a constant.

        Raises:
            UserError: this one doesn't.
        """
        if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.text):
            return int(known[1])
        condition = re.search(r"condition=%?([\w.\-]+)", loop.text)[1]
        test, body = self.computations[condition], self.computations[loop.called]
        limits = [value for op in test.values() if (value := constant(op)) is not None]
        counters = [op for op in test.values() if op.kind == "get-tuple-element"]
        if len(limits) == len(counters) == 1:
            index = int(re.search(r"index=(\d+)", counters[0].text)[1])
            after = body.get(next(reversed(body.values())).operands[index])  # of the body's result
            names = after.operands if after and after.kind == "add" else ()
            if steps := [step for name in names if (step := constant(body[name]))]:
                return limits[0] // steps[0]
        raise UserError(
            f"It can't be told how often the loop {loop.name} runs in the compiled program: take "
            "the versions of jax and libtpu that the README's table was made with"
        )

    def flops(self, name: str) -> int:
        """Of the matrix products inside a fusion."""
        operations = self.computations[name]
        return sum(
            self.flops(op.called) if op.kind == "fusion" else product_flops(op, operations)
            for op in operations.values()
        )

    def collectives(self, op: Operation, operations: dict, seen: set):
        """Quadruples (kind, axes, bytes sent, "start", "end" or "both") of an operation.

        An end alone has no kind. A fusion may begin a collective, end one, work beside one (the
        same again: `seen` holds their channels), or do one whole.
        """
        inner = self.computations[op.called] if op.kind in ("fusion", "async-start") else {}
        starts = any("AsyncCollectiveStart" in part.text for part in inner.values())
        if any("AsyncCollectiveDone" in part.text for part in inner.values()):
            yield None, None, 0, "end"
        for part in inner.values() or [op]:
            base = part.kind.removesuffix("-start").removesuffix("-done")
            if base not in COLLECTIVES:
                continue
            if part.kind.endswith("-done"):
                yield None, None, 0, "end"
                continue
            channel = re.search(r"channel_id=(\d+)", part.text)
            if channel and channel[1] in seen:
                continue
            seen.add(channel and channel[1])
            kind = base
            if base == "all-reduce" and "all-reduce-scatter" in (op.called or ""):
                kind = "reduce-scatter"
            ids = device_group(part.text, math.prod(self.sizes.values()))
            around = inner or operations
            size = sum(array_bytes(around[name].type) for name in part.operands if name in around)
            apart = starts or part.kind.endswith("-start") or op.kind == "async-start"
            mark = "start" if apart else "both"
            yield kind, self.axes(ids), sent_bytes(kind, size, len(ids)), mark
        if op.kind == "async-done":
            yield None, None, 0, "end"

    def axes(self, ids) -> tuple[str, ...]:
        """The axes of the mesh that a group of devices spans."""
        places = np.unravel_index(np.asarray(ids), tuple(self.sizes.values()))
        return tuple(
            axis for axis, place in zip(self.sizes, places, strict=True) if np.ptp(place) > 0
        )

    def memory_bytes(self, op: Operation, operations: dict) -> int:
        """What an operation reads from and writes to the chip's main memory.

        Of an array that is read in slices, or overwritten in part, the part.
        """
        if op.kind in ("parameter", "constant", "tuple", "get-tuple-element", "bitcast"):
            return 0
        if op.kind.endswith("-done"):  # its start counts
            return 0
        if op.kind == "copy-start":  # the type is of both sides
            return main_memory_bytes(op.type)
        if op.kind == "slice-start":  # the type is of the whole, the slice and a flag
            return array_bytes(op.type.partition("), ")[2])
        reads = {name: operations[name].type for name in op.operands if name in operations}
        if op.kind in ("slice", "dynamic-slice"):
            return array_bytes(op.type) + main_memory_bytes(op.type)
        if op.kind == "dynamic-update-slice":
            return 2 * array_bytes(reads[op.operands[1]])
        if op.kind != "fusion":
            return sum(map(main_memory_bytes, (op.type, *reads.values())))
        read = sum(
            self.bytes_read(op.called, i, main_memory_bytes(reads[name]))
            for i, name in enumerate(op.operands)
            if name in reads
        )
        return read + max(main_memory_bytes(op.type) - self.bytes_left_alone(op.called), 0)

    def bytes_read(self, called: str, index: int, whole: int) -> int:
        """Of a fusion's argument: `whole`, or what is sliced out of it."""
        inner = self.computations[called]

        def read(name):
            total = 0
            for user in inner.values():
                if name not in user.operands:
                    continue
                if user.kind in ("slice", "dynamic-slice"):
                    total += array_bytes(user.type)
                elif user.kind == "bitcast":
                    total += read(user.name)
                elif user.kind == "fusion":
                    total += self.bytes_read(user.called, user.operands.index(name), whole)
                elif user.kind != "dynamic-update-slice" or user.operands[0] != name:
                    total += whole
            return total

        argument = next(
            op.name
            for op in inner.values()
            if op.kind == "parameter" and op.text.startswith(f"{index})")
        )
        return min(read(argument), whole) if whole else 0

    def bytes_left_alone(self, called: str) -> int:
        """Of a fusion's result: what it has from an argument that it overwrites a part of."""
        inner = self.computations[called]

        def left(name):
            op = inner.get(name)
            if op is None:
                return 0
            if op.kind == "dynamic-update-slice":
                return array_bytes(op.type) - array_bytes(inner[op.operands[1]].type)
            if op.kind == "fusion":
                return self.bytes_left_alone(op.called)
            return sum(map(left, op.operands)) if op.kind in ("bitcast", "tuple") else 0

        return left(next(reversed(inner)))


class Clock:
    """The time of a device and of its links, which carry one collective after the other."""

    def __init__(self):
        self.now, self.links_free = 0.0, 0.0
        self.under_way = collections.deque()
        self.seen = set()

    def collective(self, mark: str, seconds: float) -> None:
        if mark != "end":
            self.links_free = max(self.links_free, self.now) + seconds
        if mark == "start":
            self.under_way.append(self.links_free)
        elif mark == "both":
            self.now = self.links_free
        elif self.under_way:
            self.now = max(self.now, self.under_way.popleft())

    def end(self) -> float:
        return max([self.now, *self.under_way])


def constant(op: Operation) -> int | None:
    """The value of a whole number."""
    value = re.match(r"\d+", op.text)
    return int(value[0]) if op.kind == "constant" and value else None


def array_bytes(type_text: str, count: Callable = lambda layout: True) -> int:
    """Of the arrays in a type; of those whose layout counts."""
    return sum(
        ITEM_BYTES.get(kind, 0) * math.prod(int(n) for n in dims.split(",") if n)
        for kind, dims, layout in ARRAY.findall(type_text)
        if count(layout)
    )


def main_memory_bytes(type_text: str) -> int:
    """Of the arrays in a type that lie in main memory: the others name their memory, S(1)."""
    return array_bytes(type_text, lambda layout: "S(" not in layout)


def sent_bytes(kind: str, operand_bytes: int, size: int) -> int:
    """What each of `size` devices sends in a collective, by a ring."""
    if kind == "collective-permute":
        return operand_bytes
    whole = operand_bytes * size if kind == "all-gather" else operand_bytes
    times = 2 if kind == "all-reduce" else 1
    return times * whole * (size - 1) // size


def device_group(text: str, num_devices: int) -> list[int]:
    """The devices that do a collective together: the first group, or a permutation's first pair."""
    if match := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", text):
        return [int(match[1]), int(match[2])]
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return [int(i) for i in match[1].split(",")]
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", text):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
        wanted = re.findall(r"'(\w+)'", match[2])
        ids = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        first = tuple(slice(None) if name in wanted else 0 for name in sizes)
        return ids[first].ravel().tolist()
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, source, order = (
            [int(n) for n in part.split(",")] if part else None for part in match.groups()
        )
        ids = np.arange(math.prod(source)).reshape(source)
        ids = ids.transpose(order) if order else ids
        return ids.reshape(shape)[0].ravel().tolist()
    return list(range(num_devices))


def product_flops(op: Operation, operations: dict) -> int:
    """Of a matrix product, which a TPU's program writes as a convolution; 0 of anything else.

    A multiplication and an addition count two; what a window covers of padding counts nothing.
    """
    if op.kind not in ("convolution", "dot"):
        return 0
    left, right = (dimensions(operations[name].type) for name in op.operands)
    result = dimensions(op.type)
    if op.kind == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", op.text)[1]
        return 2 * math.prod(result) * math.prod(left[int(i)] for i in contracted.split(",") if i)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.text).groups()
    window = re.search(r"window=\{(.*?)\}", op.text)
    window = dict(re.findall(r"(\w+)=([\d_x\-]+)", window[1] if window else ""))
    flops = 2 * right[labels[1].index("i")]
    flops *= result[labels[2].index("b")] * result[labels[2].index("f")]
    for axis in range(len(left) - 2):
        sizes = (
            dims[label.index(str(axis))]
            for dims, label in zip((left, right, result), labels, strict=True)
        )
        flops *= covered(*sizes, **{name: text.split("x")[axis] for name, text in window.items()})
    return flops


def covered(left: int, right: int, result: int, size, stride="1", pad="0_0", **dilations) -> int:
    """Pairs of a window's position and an element of it that meet an element, along one axis."""
    dilate = int(dilations.get("lhs_dilate", 1))
    at = np.arange(result)[:, None] * int(stride) - int(pad.partition("_")[0])
    at = at + np.arange(right) * int(dilations.get("rhs_dilate", 1))
    return int(np.sum((at >= 0) & (at <= (left - 1) * dilate) & (at % dilate == 0)))


def dimensions(type_text: str) -> list[int]:
    return [int(n) for n in ARRAY.search(type_text)[2].split(",") if n]
