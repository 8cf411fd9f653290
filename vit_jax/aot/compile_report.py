"""What a run needs and does on a TPU slice, by the TPU's own compiler, without the slice.

Memory and whether it fits are the compiler's word. So are the cycles of each operation; the time
of a step adds to them what the links need for the collectives (`hlo.Module.cost`), and is an
estimate: nothing has run.
"""

import importlib.metadata
import re
from collections.abc import Iterator

import jax

from vit_jax.aot import hlo
from vit_jax.errors import first_line
from vit_jax.parallel import feeding
from vit_jax.parallel.mesh import num_shards
from vit_jax.parallel.sharding import num_bytes_on_device
from vit_jax.runs import run_log
from vit_jax.scaling import flops
from vit_jax.training.program import Program

GIB = 2**30


def report(program: Program, tpu) -> dict:
    """Compiles a program for a `topology.Slice`; what it needs, as a tree for JSON.

    Bytes, operations and seconds are those of one device and one step. Where a step doesn't fit,
    `fits` is False, its part holds what the compiler says, and there is no prediction.
    """
    config, devices = program.config, len(tpu.devices)
    # Beside a program's own arguments: batches of the steps that the host has started ahead, and
    # those on their way; in evaluation the whole state, and the training batches that wait.
    batch, state = map(num_bytes_on_device, (program.batch_shapes, program.shapes))
    ahead = (run_log.STEPS_AHEAD + feeding.AHEAD) * batch
    around = ahead * program.eval_batch_size // config.batch_size + feeding.AHEAD * batch
    around += state - num_bytes_on_device(program.shapes.eval_params)
    parts = {
        "start": part(program, tpu, lambda: program.init.lower().compile(), 0),
        "train_step": part(program, tpu, lambda: program.train_step, ahead),
        "eval_step": part(program, tpu, lambda: program.eval_step, around),
    }
    return {
        "slice": tpu.name,
        "devices": devices,
        "mesh": dict(program.mesh.shape),
        "model": config.model.variant,
        "parameters": flops.num_params(program.shapes.params),
        "batch_size": config.batch_size,
        "batch_size_per_device": config.batch_size / num_shards(program.mesh),
        "accum_steps": config.accum_steps,
        "remat": config.model.remat,
        "scan": config.model.scan,
        "available_bytes": tpu.chip.memory,
        "fits": all(part["fits"] for part in parts.values()),
        **parts,
        "predicted": predicted(program, tpu, parts["train_step"]),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "libtpu")},
    }


def part(program, tpu, compiles, resident: int) -> dict:
    """Of one of the program's functions; `resident`: bytes that lie there beside what it uses."""
    try:
        compiled = compiles()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        asked = re.search(r"\(([\d.]+)G\) exceeds available", str(error))
        if not asked:
            return {"fits": False, "reason": first_line(error), "required_bytes": None}
        reason = f"the compiler asks for {asked[1]} GiB"
        return {"fits": False, "reason": reason, "required_bytes": float(asked[1]) * GIB}
    memory = compiled.memory_analysis()
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    code = memory.generated_code_size_in_bytes
    total = arguments + temporaries + outputs + code + resident
    if total > tpu.chip.memory:
        reason = f"{total / GIB:.2f} GiB with the {resident / GIB:.2f} that lie beside it"
        return {"fits": False, "reason": reason, "required_bytes": total}

    def wire(kind, axes, sent):
        return tpu.wire_seconds(program.mesh, axes, sent, one_way=kind == "collective-permute")

    cost = hlo.Module(compiled.as_text()).cost(dict(program.mesh.shape), tpu.chip.hertz, wire)
    return {
        "fits": True,
        "argument_bytes": arguments,
        "temporary_bytes": temporaries,
        "output_bytes": outputs,  # beside those that take over an argument's memory
        "code_bytes": code,
        "resident_bytes": resident,
        "total_bytes": total,
        "flops": cost.flops,
        "memory_bytes": cost.memory_bytes,
        "estimated_cycles": cost.cycles,
        "estimated_seconds": cost.seconds,
        "wire_seconds": cost.wire_seconds,
        "collectives": [
            {"kind": kind, "axes": list(axes), "count": count, "bytes_sent": sent}
            for (kind, axes), (count, sent) in sorted(cost.collectives.items())
        ],
    }


def predicted(program, tpu, step: dict) -> dict | None:
    """Of a step that fits: its time, the images of it, and what share is of use.

    mfu: the operations that the model's products need, forward and backward, without those that
    `remat` does again, of what the chip could do (arXiv:2204.02311, appendix B).
    communication_share: what of the step the device waits for its links.
    """
    if not step["fits"]:
        return None
    seconds = step["estimated_seconds"]
    images = program.config.batch_size / len(tpu.devices)
    needed = 3 * flops.forward_flops(program.model, program.image_shape) * images
    computing = step["estimated_cycles"] / tpu.chip.hertz
    return {
        "step_seconds": seconds,
        "images_per_second_per_chip": images / seconds,
        "images_per_second": program.config.batch_size / seconds,
        "mfu": needed / seconds / tpu.chip.flops,
        "communication_share": 1 - computing / seconds,
    }


def lines(report: dict) -> Iterator[str]:
    """A report on one screen."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in report["mesh"].items())
    parts = f", in {report['accum_steps']} parts" if report["accum_steps"] > 1 else ""
    yield f"Slice        {report['slice']}: {report['devices']:,} devices, mesh {mesh}"
    yield f"Model        {report['model']}: {report['parameters']:,} parameters"
    yield (
        f"Batch        {report['batch_size']:,}, {report['batch_size_per_device']:,g} a device"
        f"{parts}"
    )
    for name in ("start", "train_step", "eval_step"):
        title = name.replace("_", " ").capitalize()
        yield from part_lines(title, report[name], report["available_bytes"])
    if values := report["predicted"]:
        yield (
            f"Predicted    {1000 * values['step_seconds']:,.1f} ms a step, "
            f"{values['images_per_second_per_chip']:,.1f} images/s a chip, "
            f"{values['images_per_second']:,.0f} in all; MFU {values['mfu']:.1%}, "
            f"{values['communication_share']:.1%} of it waiting for other devices "
            "(the compiler's estimate: nothing has run)"
        )
    yield f"Fits         {'yes' if report['fits'] else 'no'}"


def part_lines(name: str, part: dict, available: int) -> Iterator[str]:
    if not part["fits"]:
        yield f"{name:13}doesn't fit {available / GIB:,.2f} GiB: {part['reason']}"
        return
    sizes = {"argument": "arguments", "temporary": "temporaries", "output": "outputs"}
    sizes |= {"code": "program", "resident": "beside it"}
    memory = ", ".join(f"{word} {part[f'{kind}_bytes'] / GIB:,.2f}" for kind, word in sizes.items())
    yield f"{name:13}{part['total_bytes'] / GIB:,.2f} of {available / GIB:,.2f} GiB: {memory}"
    yield (
        f"             {part['flops'] / 1e9:,.1f} GFLOPs, {part['memory_bytes'] / GIB:,.2f} GiB of "
        f"memory traffic, {part['estimated_cycles'] / 1e6:,.2f} M cycles"
    )
    for collective in part["collectives"]:
        axes = " x ".join(collective["axes"]) or "one device"
        yield (
            f"             {collective['count']:,} {collective['kind']} over {axes}: "
            f"{collective['bytes_sent'] / 2**20:,.1f} MiB sent"
        )


def remedies(program: Program, required: float, available: int) -> Iterator[dict]:
    """Overrides of a configuration that didn't fit, to be tried in turn: {field: value}.

    State that fills the chips is split by FSDP. Activations are computed in parts (accumulation),
    as many as would fit by what was required, then more; then recomputed as well (`remat`).
    """
    config, mesh = program.config, program.mesh
    split, data = {}, mesh.shape["data"]
    state = num_bytes_on_device(program.shapes)
    if state > 0.4 * available and data > 1:
        ways = [n for n in divisors(data) if state / n < 0.2 * available]
        split = {"mesh.data": -1, "mesh.fsdp": mesh.shape["fsdp"] * min(ways, default=data)}
        yield split
    remat = {} if config.model.remat == "full" else {"model.remat": "full"}
    local = config.batch_size // (num_shards(mesh) * config.accum_steps)
    enough = [n for n in divisors(local) if n > 1 and n >= required / available]
    for factor in dict.fromkeys(enough[:3] + enough[-1:]):
        yield split | {"accum_steps": config.accum_steps * factor}
    if remat:
        yield split | remat
        if local > 1:
            yield split | remat | {"accum_steps": config.accum_steps * local}
    if not split and data > 1:
        split = {"mesh.data": -1, "mesh.fsdp": mesh.shape["fsdp"] * data}
        yield split | remat | {"accum_steps": config.accum_steps * local}


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
