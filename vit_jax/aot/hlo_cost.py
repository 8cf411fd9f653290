"""Estimates what a compiled program costs one device: time, FLOPs, memory traffic, collectives.

XLA's own summary (`compiled.cost_analysis()`) counts the body of a loop once, and includes neither
collectives nor time. Here a loop counts as often as it runs.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from vit_jax.aot.hlo import (
    Instruction,
    Module,
    array_bytes,
    array_shape,
    device_group,
    device_pairs,
    host_transfer,
    main_memory_bytes,
)

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass
class Cost:
    """The cost of a computation to one device.

    Attributes:
        cycles: the sum of the compiler's estimates, without waiting for collectives.
        flops: floating-point operations of the matrix products.
        memory_bytes: read from and written to the chip's main memory.
        seconds: the whole duration, waiting for collectives included.
        wire_seconds: how long the device's links are busy, whether or not computation hides it.
        collectives: {(opcode, mesh axes, whether it crosses slow links): [count, bytes sent]}.
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


def no_kernels(op, instructions, memory_bytes) -> tuple[int, int]:
    """The kernels' cost of a program without kernels."""
    return 0, 0


def program_cost(
    module: Module,
    mesh_shape: dict[str, int],
    cycles_per_second: float,
    wire_seconds: Callable,
    kernel_cost: Callable = no_kernels,
    num_slices: int = 1,
) -> Cost:
    """Returns what a program costs one device.

    An instruction takes the cycles that the compiler estimates. The links inside a slice carry one
    collective at a time, and so do those between slices. A collective that the compiler has split
    into a start and an end overlaps with the instructions between the two.

    Args:
        module: the parsed program.
        mesh_shape: {axis: size}, with the devices in row-major order.
        cycles_per_second: the device's clock rate.
        wire_seconds: (opcode, mesh axes, bytes sent, crosses) -> the seconds that a collective
            takes; `crosses` is whether it is between slices.
        kernel_cost: (instruction, its computation, memory traffic in bytes) -> (cycles, FLOPs) of
            the kernel that it calls; (0, 0) if it calls none. The compiler estimates none of them.
        num_slices: how many slices the first axis of the mesh is divided over. The program numbers
            the devices of one slice.
    """
    model = CostModel(module, mesh_shape, cycles_per_second, wire_seconds, kernel_cost, num_slices)
    return model.computation(module.entry)


class CollectiveEvent(NamedTuple):
    """The start or the end of a collective.

    Attributes:
        phase: "start", "end", or "both" if the device waits for the whole collective.
        opcode: one of COLLECTIVES; None if the phase is "end".
        axes: the mesh axes that it spans.
        bytes_sent: by each device.
        crosses: whether it is between slices or hosts, over their slow links.
    """

    phase: str
    opcode: str | None = None
    axes: tuple[str, ...] = ()
    bytes_sent: int = 0
    crosses: bool = False


class Timeline:
    """The time of a device and of its links, which carry one collective after another.

    Links inside a slice and links between slices work side by side.
    """

    def __init__(self):
        self.now = 0.0
        self.links_free_at = collections.defaultdict(float)
        # Of collectives started and not yet waited for.
        self.end_times = collections.defaultdict(collections.deque)

    def collective(self, event: CollectiveEvent, seconds: float) -> None:
        """Advances by an event that keeps the links busy for some seconds."""
        phase, links, end_times = event.phase, event.crosses, self.end_times[event.crosses]
        if phase != "end":
            self.links_free_at[links] = max(self.links_free_at[links], self.now) + seconds
        if phase == "start":
            end_times.append(self.links_free_at[links])
        elif phase == "both":
            self.now = self.links_free_at[links]
        elif end_times:
            self.now = max(self.now, end_times.popleft())

    def total(self) -> float:
        return max([self.now, *(time for times in self.end_times.values() for time in times)])


class CostModel:
    """Adds up the costs of a module's instructions in the order one device runs them."""

    def __init__(
        self,
        module: Module,
        mesh_shape: dict[str, int],
        cycles_per_second: float,
        wire_seconds: Callable,
        kernel_cost: Callable,
        num_slices: int = 1,
        host_of: Sequence[int] | None = None,
    ):
        """Takes the arguments of `program_cost`, and the host of each device on the mesh."""
        self.module, self.computations = module, module.computations
        first, *_ = mesh_shape
        self.mesh_shape = mesh_shape | {first: mesh_shape[first] // num_slices}  # of one slice
        self.num_slices, self.host_of = num_slices, host_of
        self.cycles_per_second, self.wire_seconds = cycles_per_second, wire_seconds
        self.kernel_cost = kernel_cost
        self.computation = functools.cache(self.computation)
        self.fusion_flops = functools.cache(self.fusion_flops)

    def computation(self, name: str) -> Cost:
        """Returns the cost of running the entry computation, or a loop's body, once."""
        instructions, cost, timeline = self.computations[name], Cost(), Timeline()
        seen_channels = set()
        for op in instructions.values():
            if op.opcode in ("while", "call"):
                inner = self.computation(op.called)
                times = self.module.trip_count(op) if op.opcode == "while" else 1
                cost.add(inner, times)
                timeline.now += times * inner.seconds
                continue
            memory_bytes = memory_traffic(op, instructions, self.computations)
            timeline.now += self.add_operation(cost, op, instructions, memory_bytes)
            for event in self.collective_events(op, instructions, seen_channels):
                seconds = 0.0
                if event.opcode:
                    seconds = self.wire_seconds(*event[1:])
                    cost.wire_seconds += seconds
                    total = cost.collectives[event.opcode, event.axes, event.crosses]
                    total[0] += 1
                    total[1] += event.bytes_sent
                timeline.collective(event, seconds)
        cost.seconds = timeline.total()
        return cost

    def add_operation(
        self, cost: Cost, op: Instruction, instructions: dict, memory_bytes: int
    ) -> float:
        """Adds an instruction that isn't a loop to the cost; returns the seconds it takes."""
        kernel_cycles, kernel_flops = self.kernel_cost(op, instructions, memory_bytes)
        cycles = op.estimated_cycles + kernel_cycles
        cost.cycles += cycles
        cost.flops += kernel_flops
        cost.flops += self.fusion_flops(op.called) if op.called else product_flops(op, instructions)
        cost.memory_bytes += memory_bytes
        return cycles / self.cycles_per_second

    def fusion_flops(self, name: str) -> int:
        """Returns the operations of the matrix products inside a fusion."""
        instructions = self.computations[name]
        return sum(
            self.fusion_flops(op.called)
            if op.opcode == "fusion"
            else product_flops(op, instructions)
            for op in instructions.values()
        )

    def collective_events(
        self, op: Instruction, instructions: dict, seen_channels: set
    ) -> Iterator[CollectiveEvent]:
        """Yields the collectives that an instruction starts, ends or runs.

        A fusion may start a collective, end one, run one whole, or compute while one is in
        flight. In the last case it repeats the collective, with a channel that was seen before.
        """
        inner = self.computations[op.called] if op.opcode in ("fusion", "async-start") else {}
        starts = any("AsyncCollectiveStart" in part.text for part in inner.values())
        if any("AsyncCollectiveDone" in part.text for part in inner.values()):
            yield CollectiveEvent("end")
        if op.opcode in ("send", "recv-done"):
            yield from self.slice_events(op, instructions)
        for part in inner.values() or [op]:
            opcode = part.opcode.removesuffix("-start").removesuffix("-done")
            if opcode not in COLLECTIVES:
                continue
            if part.opcode.endswith("-done"):
                yield CollectiveEvent("end")
                continue
            if part.channel and part.channel in seen_channels:
                continue
            seen_channels.add(part.channel)
            if opcode == "all-reduce" and "all-reduce-scatter" in (op.called or ""):
                opcode = "reduce-scatter"
            group = device_group(part.text, math.prod(self.mesh_shape.values()))
            scope = inner or instructions
            operand_bytes = sum(array_bytes(scope[n].type) for n in part.operands if n in scope)
            is_async = starts or part.opcode.endswith("-start") or op.opcode == "async-start"
            yield CollectiveEvent(
                "start" if is_async else "both",
                opcode,
                self.spanned_axes(group),
                bytes_sent(opcode, operand_bytes, len(group)),
                self.crosses_hosts(device_pairs(part.text) or [group]),
            )
        if op.opcode == "async-done":
            yield CollectiveEvent("end")

    def slice_events(self, op: Instruction, instructions: dict) -> Iterator[CollectiveEvent]:
        """Yields the collective between slices that a `send` starts or a `recv-done` ends."""
        if op.opcode == "recv-done":
            received = instructions.get(op.operands[0])
            if received and host_transfer(received.text):
                yield CollectiveEvent("end", crosses=True)
        elif opcode := host_transfer(op.text):
            sent = bytes_sent(
                opcode, array_bytes(instructions[op.operands[0]].type), self.num_slices
            )
            yield CollectiveEvent(
                "start", opcode, (next(iter(self.mesh_shape)),), sent, crosses=True
            )

    def crosses_hosts(self, groups: list[list[int]]) -> bool:
        """Whether the devices of a group are in more than one host."""
        hosts = self.host_of
        return hosts is not None and any(len({hosts[i] for i in group}) > 1 for group in groups)

    def spanned_axes(self, device_ids: list[int]) -> tuple[str, ...]:
        """Returns the mesh axes along which a group of devices differ."""
        coordinates = np.unravel_index(np.asarray(device_ids), tuple(self.mesh_shape.values()))
        return tuple(
            axis
            for axis, along in zip(self.mesh_shape, coordinates, strict=True)
            if np.ptp(along) > 0
        )


def memory_traffic(op: Instruction, instructions: dict, computations: dict) -> int:
    """Returns the bytes that an instruction reads from and writes to main memory.

    An array that is read in slices, or overwritten in part, counts with those parts alone.

    Args:
        op: the instruction.
        instructions: those of its computation, by name.
        computations: the module's.
    """
    if op.opcode in ("parameter", "constant", "tuple", "get-tuple-element", "bitcast"):
        return 0
    opcode, _, phase = op.opcode.rpartition("-")
    if opcode in COLLECTIVES and phase == "done":  # the start's type repeats the operands
        return main_memory_bytes(op.type)
    if phase == "done":  # counted at its start
        return 0
    if op.opcode == "async-start":
        inner = computations[op.called]
        return sum(memory_traffic(part, inner, computations) for part in inner.values())
    if op.opcode == "copy-start":  # the type has both source and destination
        return main_memory_bytes(op.type)
    if op.opcode == "slice-start":  # the type has the whole array, the slice and a flag
        return array_bytes(op.type.partition("), ")[2])
    read = {name: instructions[name].type for name in op.operands if name in instructions}
    if opcode in COLLECTIVES and phase == "start":
        return sum(map(main_memory_bytes, read.values()))
    if op.opcode in ("slice", "dynamic-slice"):
        return array_bytes(op.type) + main_memory_bytes(op.type)
    if op.opcode == "dynamic-update-slice":
        return 2 * array_bytes(read[op.operands[1]])
    if op.opcode != "fusion":
        return sum(map(main_memory_bytes, (op.type, *read.values())))
    bytes_read = sum(
        fusion_bytes_read(op.called, i, main_memory_bytes(read[name]), computations)
        for i, name in enumerate(op.operands)
        if name in read
    )
    bytes_kept = fusion_bytes_kept(op.called, computations)
    return bytes_read + max(main_memory_bytes(op.type) - bytes_kept, 0)


def fusion_bytes_read(name: str, index: int, num_bytes: int, computations: dict) -> int:
    """Returns how much of its operand number `index` a fusion reads.

    Args:
        name: of the fusion's computation.
        index: of the operand.
        num_bytes: the operand's size, and the most that is returned.
        computations: the module's.
    """
    instructions = computations[name]

    def uses(value: str) -> int:
        total = 0
        for user in instructions.values():
            if value not in user.operands:
                continue
            if user.opcode in ("slice", "dynamic-slice"):
                total += array_bytes(user.type)
            elif user.opcode == "bitcast":
                total += uses(user.name)
            elif user.opcode == "fusion":
                operand = user.operands.index(value)
                total += fusion_bytes_read(user.called, operand, num_bytes, computations)
            elif user.opcode != "dynamic-update-slice" or user.operands[0] != value:
                total += num_bytes
        return total

    parameter = next(
        op.name
        for op in instructions.values()
        if op.opcode == "parameter" and op.text.startswith(f"{index})")
    )
    return min(uses(parameter), num_bytes) if num_bytes else 0


def fusion_bytes_kept(name: str, computations: dict) -> int:
    """Returns how much of a fusion's result is unchanged: an operand that it updates in place."""
    instructions = computations[name]

    def kept(value: str) -> int:
        op = instructions.get(value)
        if op is None:
            return 0
        if op.opcode == "dynamic-update-slice":
            return array_bytes(op.type) - array_bytes(instructions[op.operands[1]].type)
        if op.opcode == "fusion":
            return fusion_bytes_kept(op.called, computations)
        return sum(map(kept, op.operands)) if op.opcode in ("bitcast", "tuple") else 0

    return kept(next(reversed(instructions)))


def bytes_sent(opcode: str, operand_bytes: int, group_size: int) -> int:
    """Returns the bytes that each device of a group sends in a collective, run as a ring."""
    if opcode == "collective-permute":
        return operand_bytes
    total = operand_bytes * group_size if opcode == "all-gather" else operand_bytes
    rounds = 2 if opcode == "all-reduce" else 1  # a reduce-scatter and an all-gather
    return rounds * total * (group_size - 1) // group_size


def product_flops(op: Instruction, instructions: dict) -> int:
    """Returns the operations of a matrix product; 0 for any other instruction.

    A TPU's program writes products as convolutions. A multiplication and an addition count as
    two; elements of a window that fall on padding don't count.
    """
    if op.opcode not in ("convolution", "dot"):
        return 0
    left, right = (array_shape(instructions[name].type) for name in op.operands)
    result = array_shape(op.type)
    if op.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", op.text)[1]
        return 2 * math.prod(result) * math.prod(left[int(i)] for i in contracted.split(",") if i)
    return convolution_flops(left, right, result, op.text)


def convolution_flops(left: list[int], right: list[int], result: list[int], text: str) -> int:
    """Returns the operations of a convolution.

    Args:
        left, right, result: the shapes of input, window and output.
        text: with HLO's attributes `dim_labels` and `window`.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", text).groups()
    window = re.search(r"window=\{(.*?)\}", text)
    window = dict(re.findall(r"(\w+)=([\d_x\-]+)", window[1] if window else ""))
    flops = 2 * right[labels[1].index("i")]
    flops *= result[labels[2].index("b")] * result[labels[2].index("f")]
    for axis in range(len(left) - 2):
        sizes = (
            shape[label.index(str(axis))]
            for shape, label in zip((left, right, result), labels, strict=True)
        )
        along_axis = {name: text.split("x")[axis] for name, text in window.items()}
        flops *= window_overlaps(*sizes, along_axis)
    return flops


def window_overlaps(left: int, right: int, result: int, window: dict[str, str]) -> int:
    """Counts the pairs of a window's position and a window's element that meet an input element.

    Args:
        left, right, result: the sizes of input, window and output along one axis.
        window: HLO's attributes of the window along this axis.
    """
    stride, dilation = int(window.get("stride", 1)), int(window.get("lhs_dilate", 1))
    padding = int(window.get("pad", "0_0").partition("_")[0])
    index = np.arange(result)[:, None] * stride - padding  # (positions, 1)
    index = index + np.arange(right) * int(window.get("rhs_dilate", 1))  # (positions, elements)
    inside = (index >= 0) & (index <= (left - 1) * dilation) & (index % dilation == 0)
    return int(np.sum(inside))
