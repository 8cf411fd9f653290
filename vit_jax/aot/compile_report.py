"""The memory and the speed of a run on TPUs or GPUs, according to their own compiler.

Memory, and whether the run fits, are what the compiler reports. On a TPU the time of a step is an
estimate: the compiler's cycles of each instruction, the schedule of the attention kernel
(`kernel_cost`), and the time that collectives take on the chip's links (`hlo_cost.program_cost`).
For a GPU there is only a lower bound (`gpu_cost`). Nothing is run.
"""

import concurrent.futures
import importlib.metadata
import re
from collections.abc import Callable, Iterator

import jax

from vit_jax.aot import gpu_cost, hlo, hlo_cost, kernel_cost
from vit_jax.aot.gpu import Gpus
from vit_jax.aot.topology import Slice
from vit_jax.errors import first_line
from vit_jax.logs import run_log
from vit_jax.parallel import feeding
from vit_jax.parallel.mesh import count_slices, num_shards
from vit_jax.parallel.sharding import num_bytes_on_device
from vit_jax.scaling import flops
from vit_jax.training.program import Program

GIB = 2**30
MIB = 2**20
FUNCTIONS = ("start", "train_step", "eval_step")


def create_report(program: Program, target: Slice | Gpus) -> dict:
    """Compiles a program's functions for a machine and returns the report, a tree for JSON.

    Bytes, operations and seconds are per device and step. For a function that doesn't fit, `fits`
    is False and `reason` says why; if it is the training step, `predicted` and `bound` are None.
    """
    config = program.config
    resident = resident_bytes(program)
    functions = {
        "start": lambda: program.init.lower().compile(),
        "train_step": lambda: program.train_step,
        "eval_step": lambda: program.eval_step,
    }

    def report_on(name):
        return function_report(program, target, functions[name], resident[name])

    with concurrent.futures.ThreadPoolExecutor(target.compiler_threads) as pool:
        parts = dict(zip(functions, pool.map(report_on, functions), strict=True))
    fits = all(part["fits"] for part in parts.values())
    required = max(part.get("total_bytes", 0) for part in parts.values())
    return {
        "slice": target.name,
        "devices": len(target.devices),
        "device_kind": target.devices[0].device_kind,
        "mesh": dict(program.mesh.shape),
        "slices": target.num_slices,
        "model": config.model.variant,
        "parameters": flops.num_params(program.shapes.params),
        "batch_size": config.batch_size,
        "batch_size_per_device": config.batch_size / num_shards(program.mesh),
        "accum_steps": config.accum_steps,
        "attention": program.attention,
        "remat": program.remat,
        "scan": config.model.scan,
        "available_bytes": target.memory_bytes,
        "fits": fits,
        "environment": target.environment(required) if fits else {},
        **parts,
        "predicted": predict(program, target, parts["train_step"]),
        "bound": bound(parts["train_step"]),
        "versions": {name: importlib.metadata.version(name) for name in target.packages},
    }


def resident_bytes(program: Program) -> dict[str, int]:
    """Returns the bytes per device that a run holds besides what each function itself uses.

    In training these are the batches of steps that are already dispatched, and those in transfer.
    In evaluation they are such batches of evaluation, the training batches that wait, and the
    state except for the parameters that are evaluated.
    """
    batch, state = map(num_bytes_on_device, (program.batch_shapes, program.shapes))
    in_flight = (run_log.STEPS_AHEAD + feeding.AHEAD) * batch
    in_evaluation = in_flight * program.eval_batch_size // program.config.batch_size
    in_evaluation += feeding.AHEAD * batch
    in_evaluation += state - num_bytes_on_device(program.shapes.eval_params)
    return {"start": 0, "train_step": in_flight, "eval_step": in_evaluation}


def function_report(
    program: Program, target: Slice | Gpus, compile_function: Callable, resident: int
) -> dict:
    """Compiles one function and returns its memory and cost.

    Args:
        program: the run that it is part of.
        target: the machine to compile for.
        compile_function: () -> the compiled function.
        resident: the bytes per device that the run holds besides.
    """
    available = target.memory_bytes
    try:
        compiled = compile_function()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        required = re.search(r"\(([\d.]+)G\) exceeds available", str(error))
        if not required:
            return does_not_fit(first_line(error), None)
        return does_not_fit(f"the compiler requires {required[1]} GiB", float(required[1]) * GIB)
    memory = compiled.memory_analysis()
    sizes = {
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        # Outputs that reuse the memory of a donated argument don't count.
        "output_bytes": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "code_bytes": memory.generated_code_size_in_bytes,
        "resident_bytes": resident,
    }
    total = sum(sizes.values())
    if total > available:
        return does_not_fit(
            f"it requires {total / GIB:.2f} GiB, of which {resident / GIB:.2f} are resident", total
        )
    return {"fits": True, **sizes, "total_bytes": total, **cost_report(program, target, compiled)}


def does_not_fit(reason: str, required: float | None) -> dict:
    return {"fits": False, "reason": reason, "required_bytes": required}


def cost_report(program: Program, target: Slice | Gpus, compiled) -> dict:
    """Returns the cost of a compiled function: `hlo_cost.Cost` as a tree for JSON."""
    module, mesh_shape = hlo.Module(compiled.as_text()), dict(program.mesh.shape)
    if isinstance(target, Gpus):
        host_of = [device.process_index for device in program.mesh.devices.flat]
        cost = gpu_cost.program_bound(module, mesh_shape, target.card, host_of)
        times = {"bound_seconds": cost.seconds}
    else:
        cost = estimated_cost(module, program.mesh, target)
        times = {
            "estimated_cycles": cost.cycles,
            "estimated_seconds": cost.seconds,
            "wire_seconds": cost.wire_seconds,
        }
    return {
        "flops": cost.flops,
        "memory_bytes": cost.memory_bytes,
        **times,
        "collectives": [
            {
                "kind": opcode,
                "axes": list(axes),
                "between": target.groups if crosses else None,
                "count": count,
                "bytes_sent": bytes_sent,
            }
            for (opcode, axes, crosses), (count, bytes_sent) in sorted(cost.collectives.items())
        ],
    }


def estimated_cost(module: hlo.Module, mesh, tpu: Slice) -> hlo_cost.Cost:
    """Returns the cost of a program to one device of TPU slices."""

    def wire_seconds(opcode, axes, bytes_sent, crosses):
        return tpu.wire_seconds(
            mesh, axes, bytes_sent, one_way=opcode == "collective-permute", crosses=crosses
        )

    def cost_of_kernel(op, instructions, memory_bytes):
        kernel = kernel_cost.find_kernel(op, instructions)
        if kernel is None:
            return 0, 0
        cycles = kernel_cost.kernel_cycles(kernel, memory_bytes, tpu)
        return cycles, kernel_cost.kernel_flops(kernel)

    cycles_per_second = tpu.chip.cycles_per_second
    return hlo_cost.program_cost(
        *(module, dict(mesh.shape), cycles_per_second, wire_seconds, cost_of_kernel),
        num_slices=tpu.num_slices,
    )


def bound(train_step: dict) -> dict | None:
    """Returns the least time of a training step; None if it is estimated, or doesn't fit."""
    seconds = train_step.get("bound_seconds")
    return seconds and {"step_seconds": seconds}


def predict(program: Program, tpu: Slice | Gpus, train_step: dict) -> dict | None:
    """Returns the predicted speed of training; None if there is no estimate, or it doesn't fit.

    Args:
        train_step: the training step's `function_report`.

    Returns:
        step_seconds, images_per_second_per_chip, images_per_second, and
        mfu: model FLOPs utilization (arXiv:2204.02311, appendix B): the operations of the model's
            matrix products, forward and backward, without those that `remat` repeats, as a share
            of the chip's peak.
        communication_share: the share of the step that a device waits for others.
    """
    if "estimated_seconds" not in train_step:
        return None
    seconds = train_step["estimated_seconds"]
    images = program.config.batch_size / len(tpu.devices)
    model_flops = flops.training_flops(program.model, program.image_shape) * images
    computing = train_step["estimated_cycles"] / tpu.chip.cycles_per_second
    return {
        "step_seconds": seconds,
        "images_per_second_per_chip": images / seconds,
        "images_per_second": program.config.batch_size / seconds,
        "mfu": model_flops / seconds / tpu.chip.flops,
        "communication_share": 1 - computing / seconds,
    }


def report_lines(report: dict) -> Iterator[str]:
    """Yields the lines of a report as text, which fit on one screen."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in report["mesh"].items())
    accum_steps = report["accum_steps"]
    title = "Slice" if report["device_kind"].startswith("TPU") else "GPUs"
    slices = f" in {report['slices']} slices" if report["slices"] > 1 else ""
    yield f"{title:13}{report['slice']}: {report['devices']:,} devices{slices}, mesh {mesh}"
    yield (
        f"Model        {report['model']}: {report['parameters']:,} parameters, attention by "
        f"{report['attention']}, remat {report['remat']}"
    )
    yield (
        f"Batch        {report['batch_size']:,}, {report['batch_size_per_device']:,g} per device"
        f"{f', in {accum_steps} microbatches' if accum_steps > 1 else ''}"
    )
    for name in FUNCTIONS:
        title = name.replace("_", " ").capitalize()
        yield from function_lines(title, report[name], report["available_bytes"])
    if values := report["predicted"]:
        yield (
            f"Predicted    {1000 * values['step_seconds']:,.1f} ms per step, "
            f"{values['images_per_second_per_chip']:,.1f} images/s per chip, "
            f"{values['images_per_second']:,.0f} images/s in total"
        )
        yield (
            f"             MFU {values['mfu']:.1%}, {values['communication_share']:.1%} of the "
            "step waiting for other devices (estimates: nothing was run)"
        )
    if values := report["bound"]:
        milliseconds = 1000 * values["step_seconds"]
        yield (
            f"Bound        at least {milliseconds:,.1f} ms per step: each operation at the card's "
            "peak FLOPs or full memory"
        )
        yield "             bandwidth, whichever is longer; without collectives (nothing was run)"
    yield f"Fits         {'yes' if report['fits'] else 'no'}"
    for name, value in report["environment"].items():
        yield f"             with {name}={value} in the environment: by default JAX takes less"


def function_lines(title: str, part: dict, available: int) -> Iterator[str]:
    """Yields the lines of a report on one function."""
    if not part["fits"]:
        yield f"{title:13}doesn't fit {available / GIB:,.2f} GiB: {part['reason']}"
        return
    words = {"argument": "arguments", "temporary": "temporaries", "output": "outputs"}
    words |= {"code": "program", "resident": "resident"}
    memory = ", ".join(f"{word} {part[f'{kind}_bytes'] / GIB:,.2f}" for kind, word in words.items())
    yield f"{title:13}{part['total_bytes'] / GIB:,.2f} of {available / GIB:,.2f} GiB: {memory}"
    if "bound_seconds" in part:
        time = f"at least {1000 * part['bound_seconds']:,.1f} ms"
    else:
        time = f"{part['estimated_cycles'] / 1e6:,.2f} M cycles"
    yield (
        f"             {part['flops'] / 1e9:,.1f} GFLOPs, {part['memory_bytes'] / GIB:,.2f} GiB of "
        f"memory traffic, {time}"
    )
    for collective in part["collectives"]:
        axes = " x ".join(collective["axes"]) or "one device"
        if collective["between"]:
            axes += f" between {collective['between']}"
        yield (
            f"             {collective['count']:,} {collective['kind']} over {axes}: "
            f"{collective['bytes_sent'] / MIB:,.1f} MiB sent"
        )


def remedies(program: Program, required: float, available: int) -> Iterator[dict]:
    """Yields overrides that may make a run fit, the cheapest first: {field: value}.

    A state that fills the chips is split by FSDP. Activations are reduced by gradient
    accumulation: by as many microbatches as `required` suggests, then more. Then `remat` is added.

    Args:
        program: the run that doesn't fit.
        required: the bytes per device that it needs.
        available: the bytes per device that it has.
    """
    config, mesh = program.config, program.mesh
    slices = config.mesh.slices or count_slices(mesh.devices.ravel())
    fsdp, num_data = {}, mesh.shape["data"] // slices  # FSDP stays inside a slice
    state = num_bytes_on_device(program.shapes)
    if state > 0.4 * available and num_data > 1:
        enough = [n for n in divisors(num_data) if state / n < 0.2 * available]
        fsdp = split_state(mesh, min(enough, default=num_data))
        yield fsdp
    remat = {} if program.remat == "full" else {"model.remat": "full"}
    microbatch = config.batch_size // (num_shards(mesh) * config.accum_steps)  # per device
    enough = [n for n in divisors(microbatch) if n > 1 and n >= required / available]
    for factor in dict.fromkeys(enough[:3] + enough[-1:]):
        yield fsdp | {"accum_steps": config.accum_steps * factor}
    smallest_microbatch = {"accum_steps": config.accum_steps * microbatch}
    if remat:
        yield fsdp | remat
        if microbatch > 1:
            yield fsdp | remat | smallest_microbatch
    if not fsdp and num_data > 1:
        yield split_state(mesh, num_data) | remat | smallest_microbatch


def split_state(mesh, factor: int) -> dict:
    """Returns the overrides that split the state `factor` times as far by FSDP."""
    return {"mesh.data": -1, "mesh.fsdp": mesh.shape["fsdp"] * factor}


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
