"""train.py --compile_for=SLICE: whether a run fits a TPU slice, and how fast, without the slice."""

import json
import logging
import pathlib
import time

import input_pipeline
from vit_jax import compile_report, run_folder, run_log, sharding, topology
from vit_jax.errors import DoesNotFit
from vit_jax.program import Program

logger = logging.getLogger("vit_jax")

ANY_STEPS = 1_000_000  # of a run whose dataset isn't here: a program doesn't depend on it


def check(config, slice_name: str, workdir=None) -> dict:
    """Compiles the run's steps for a slice, shows the report, and writes it to the folder.

    Raises:
        UserError: no such slice; a configuration that can't work.
        DoesNotFit: naming what would help, which was compiled too.
    """
    run_log.start_logging()
    input_pipeline.check(config)
    if workdir:
        run_folder.make(workdir)
    tpu = topology.Slice(slice_name)
    config = without_dataset(config)
    program, report = compiled(config, tpu)
    for line in compile_report.lines(report):
        logger.info(line)
    write(report, workdir)
    if report["fits"]:
        return report
    remedy, fitting = find_remedy(config, tpu, program, report)
    write(report | {"remedy": remedy, "with_remedy": fitting}, workdir)
    if remedy is None:
        raise DoesNotFit(f"The run doesn't fit {slice_name}, whatever was tried: take a larger one")
    raise DoesNotFit(f"The run doesn't fit {slice_name}. It does with {flags(remedy)}")


def write(report: dict, workdir) -> None:
    if workdir:
        path = pathlib.Path(workdir) / "compile_report.json"
        run_folder.write_at_once(path, json.dumps(report, indent=2))


def compiled(config, tpu) -> tuple[Program, dict]:
    mesh = sharding.create_mesh(**config.mesh, devices=tpu.devices)
    program = Program(config, input_pipeline.image_shape(config), mesh)
    return program, compile_report.report(program, tpu)


def find_remedy(config, tpu, program, report) -> tuple[dict | None, dict | None]:
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
        _, found = compiled(changed, tpu)
        fits = "fits" if found["fits"] else "doesn't fit"
        logger.info(f"{fits} ({time.perf_counter() - start:.0f} s): {flags(overrides)}")
        if found["fits"]:
            for line in compile_report.lines(found):
                logger.info(line)
            return overrides, found
    return None, None


def flags(overrides: dict) -> str:
    return " ".join(f"--config.{name}={value}" for name, value in overrides.items())


def without_dataset(config):
    """The configuration with the classes filled in, and a number of steps; needs no data."""
    config = config.copy_and_resolve_references()
    config.num_classes = config.num_classes or input_pipeline.num_classes(config.dataset)
    config.total_steps = config.total_steps or ANY_STEPS
    return config
