"""`train.py --compile_for=SLICE`: whether a run fits a TPU slice, and how fast it would be."""

import json
import logging
import pathlib
import time

from vit_jax.aot import compile_report, topology
from vit_jax.errors import DoesNotFit
from vit_jax.files import write_atomically
from vit_jax.parallel.mesh import check_batch_size, create_mesh
from vit_jax.runs import run_folder
from vit_jax.training.program import Program

logger = logging.getLogger("vit_jax")

ANY_STEPS = 1_000_000  # where num_epochs needs the dataset: the program doesn't depend on it


def check(config, image_shape: tuple[int, int, int], slice_name: str, workdir=None) -> dict:
    """Compiles a run's steps for a TPU slice, and logs and returns the report.

    Args:
        config: a run's configuration, with `num_classes` filled in.
        image_shape: (H, W, C).
        slice_name: such as "v5e:16x16".
        workdir: a folder to write compile_report.json to, or None.

    Raises:
        UserError: an unknown slice, or a configuration that can't work.
        DoesNotFit: the run needs more memory; the message names overrides that help.
    """
    if workdir:
        run_folder.make(workdir)
    tpu = topology.Slice(slice_name)
    config = config.copy_and_resolve_references()
    config.total_steps = config.total_steps or ANY_STEPS
    program, report = compiled(config, image_shape, tpu)
    for line in compile_report.lines(report):
        logger.info(line)
    write(report, workdir)
    if report["fits"]:
        return report
    remedy, fitting = find_remedy(config, image_shape, tpu, program, report)
    write(report | {"remedy": remedy, "with_remedy": fitting}, workdir)
    if remedy is None:
        raise DoesNotFit(f"The run doesn't fit {slice_name}, whatever was tried: take a larger one")
    raise DoesNotFit(f"The run doesn't fit {slice_name}. It does with {flags(remedy)}")


def write(report: dict, workdir) -> None:
    if workdir:
        path = pathlib.Path(workdir) / "compile_report.json"
        write_atomically(path, json.dumps(report, indent=2) + "\n")


def compiled(config, image_shape, tpu) -> tuple[Program, dict]:
    mesh = create_mesh(**config.mesh, devices=tpu.devices)
    check_batch_size(config.batch_size, config.accum_steps, mesh)
    program = Program(config, image_shape, mesh)
    return program, compile_report.report(program, tpu)


def find_remedy(config, image_shape, tpu, program, report) -> tuple[dict | None, dict | None]:
    """The first overrides with which the run fits, having compiled it, and its report then."""
    required = max(
        part["required_bytes"] or 0.0
        for part in report.values()
        if isinstance(part, dict) and part.get("fits") is False
    )
    for overrides in compile_report.remedies(program, required, report["available_bytes"]):
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict(overrides)
        start = time.perf_counter()
        _, found = compiled(changed, image_shape, tpu)
        fits = "fits" if found["fits"] else "doesn't fit"
        logger.info(f"{fits} ({time.perf_counter() - start:.0f} s): {flags(overrides)}")
        if found["fits"]:
            for line in compile_report.lines(found):
                logger.info(line)
            return overrides, found
    return None, None


def flags(overrides: dict) -> str:
    return " ".join(f"--config.{name}={value}" for name, value in overrides.items())
