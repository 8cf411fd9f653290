"""`train.py --compile_for=MACHINE`: whether a run fits a TPU slice or GPUs, and its speed."""

import json
import logging
import pathlib
import time

from vit_jax.aot import compile_report, topology
from vit_jax.aot.gpu import Gpus
from vit_jax.aot.topology import Slice
from vit_jax.errors import DoesNotFit
from vit_jax.parallel.mesh import check_batch_size, create_mesh
from vit_jax.runs import run_folder
from vit_jax.storage.files import write_atomically
from vit_jax.training.program import Program

logger = logging.getLogger("vit_jax")

# Stands for a run's total_steps, which may depend on the dataset; the compiled program doesn't
# depend on it.
ANY_STEPS = 1_000_000


def compile_and_report(config, image_shape: tuple[int, int, int], name: str, workdir=None) -> dict:
    """Compiles a run's steps for a TPU slice or GPUs; logs and returns the report.

    Args:
        config: a run's configuration, with `num_classes` filled in.
        image_shape: (H, W, C).
        name: such as "v5e:16x16" or "h100:8".
        workdir: the folder to write compile_report.json to; None: no file.

    Returns:
        The report, see `compile_report.create_report`.

    Raises:
        UserError: an unknown machine, or a configuration that can't work.
        DoesNotFit: the run needs more memory; the message names overrides that help.
    """
    if workdir:
        run_folder.make(workdir)
    target = topology.create(name)
    config = config.copy_and_resolve_references()
    config.total_steps = config.total_steps or ANY_STEPS
    program, report = compile_program(config, image_shape, target)
    log_report(report)
    write_report(report, workdir)
    if report["fits"]:
        return report
    remedy, fitting_report = find_remedy(program, target, report)
    write_report(report | {"remedy": remedy, "with_remedy": fitting_report}, workdir)
    if remedy is None:
        raise DoesNotFit(
            f"The run doesn't fit {name}, with none of the remedies tried: use more devices, or "
            "devices with more memory"
        )
    raise DoesNotFit(f"The run doesn't fit {name}; it does with {override_flags(remedy)}")


def compile_program(
    config, image_shape: tuple[int, int, int], target: Slice | Gpus
) -> tuple[Program, dict]:
    """Compiles a run's functions for a machine; returns the program and its report.

    Raises:
        UserError: the mesh or the batch size doesn't fit the number of devices.
    """
    mesh = create_mesh(**config.mesh, devices=target.devices)
    check_batch_size(config.batch_size, config.accum_steps, mesh)
    program = Program(config, image_shape, mesh, memory_bytes=target.memory_bytes)
    program.memory_bytes -= max(compile_report.resident_bytes(program).values())
    return program, compile_report.create_report(program, target)


def find_remedy(
    program: Program, target: Slice | Gpus, report: dict
) -> tuple[dict | None, dict | None]:
    """Compiles a run that doesn't fit with other settings, until one fits.

    Returns:
        The overrides and their report; (None, None) if nothing fits.
    """
    required = max(
        part["required_bytes"] or 0.0
        for part in report.values()
        if isinstance(part, dict) and part.get("fits") is False
    )
    for overrides in compile_report.remedies(program, required, report["available_bytes"]):
        changed = program.config.copy_and_resolve_references()
        changed.update_from_flattened_dict(overrides)
        start = time.perf_counter()
        _, changed_report = compile_program(changed, program.image_shape, target)
        seconds = time.perf_counter() - start
        result = "fits" if changed_report["fits"] else "doesn't fit"
        logger.info(f"With {override_flags(overrides)}: {result} (compiled in {seconds:.0f} s)")
        if changed_report["fits"]:
            log_report(changed_report)
            return overrides, changed_report
    return None, None


def log_report(report: dict) -> None:
    for line in compile_report.report_lines(report):
        logger.info(line)


def write_report(report: dict, workdir) -> None:
    if workdir:
        path = pathlib.Path(workdir) / "compile_report.json"
        write_atomically(path, json.dumps(report, indent=2) + "\n")


def override_flags(overrides: dict) -> str:
    """Returns overrides as command-line flags."""
    return " ".join(f"--config.{name}={value}" for name, value in overrides.items())
