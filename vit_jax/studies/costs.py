"""What the cells of a study cost before they are run."""

import hashlib
import json
import shlex
import subprocess
import sys
from collections.abc import Callable

from vit_jax import models
from vit_jax.checks import size_pair
from vit_jax.errors import UserError
from vit_jax.storage.files import open_path
from vit_jax.studies import launching, pages

EXIT_DOES_NOT_FIT = 3  # as in command_line.py
# Of the split "train", in images: a dataset needn't be prepared for its study to be counted.
NUM_EXAMPLES = {"imagenet2012": 1_281_167, "cifar10": 50_000, "cifar100": 50_000, "digits": 1_442}
# What a compiled step doesn't depend on: cells that differ in nothing else are compiled once.
NOT_COMPILED = ("total_steps", "num_epochs", "schedule.", "dataset.", "optimizer.weight_decay")


def cost(cell: pages.Cell, root, count: Callable[[object, tuple], tuple[int, int]]) -> dict:
    """Returns what a cell costs.

    Args:
        cell: the cell.
        root: the study's folder.
        count: (model, image shape) -> (parameters, FLOPs of the forward pass of one image).

    Returns:
        variant; params; gflops, of one image forward; images that it sees; exaflops, three times
        the forward passes'; steps. images, exaflops and steps are None if the dataset's size
        decides and isn't known.

    Raises:
        UserError: the model can't be.
    """
    config = pages.configured(cell.config, cell.overrides(root))
    shape = (*size_pair("config.image_size", config.image_size), config.dataset.channels)
    with config.unlocked():
        config.num_classes = config.num_classes or 1000
    try:
        model = models.from_config(config)
        models.check_image(model, shape[:2])
        params, flops = count(model, shape)
    except UserError as error:
        raise UserError(f"{cell.name}: {error}") from None
    steps = total_steps(config)
    if steps is not None:
        steps -= first_step(config)
    images = None if steps is None else steps * config.batch_size
    return dict(
        variant=config.model.variant,
        params=params,
        gflops=flops / 1e9,
        steps=steps,
        images=images,
        exaflops=None if images is None else 3 * flops * images / 1e18,
    )


def first_step(config) -> int:
    """Returns the step that a run begins at: 0, unless it is a branch."""
    if config.init_mode != "continue":
        return 0
    step = str(config.init_from).rstrip("/").rpartition("/")[2]
    return int(step) if step.isdecimal() else 0


def total_steps(config) -> int | None:
    """Returns how many steps a run has; None if that isn't known without its dataset."""
    if config.total_steps is not None:
        return config.total_steps
    examples = NUM_EXAMPLES.get(config.dataset.name)
    if chosen := config.dataset.examples:
        examples = chosen if chosen >= 1 else examples and chosen * examples
    elif config.dataset.train_split != "train":
        examples = None
    return examples and round(config.num_epochs * examples / config.batch_size)


def step_seconds(cell: pages.Cell, study: pages.Study, root, machine: str) -> float | None:
    """Returns the seconds of a cell's training step on a machine, as --compile_for predicts.

    Reports are kept below <root>/.study/, so that each program is compiled once.

    Args:
        machine: such as "v5e:4x4".

    Returns:
        The prediction, for GPUs a lower bound; None if the run doesn't fit.

    Raises:
        UserError: it can't be compiled.
    """
    fields = {
        name: value
        for name, value in cell.overrides(root).items()
        if not name.startswith(NOT_COMPILED) and name not in ("init_from", "init_mode")
    }
    flags = [f"--config.{name}={launching.flag_value(value)}" for name, value in fields.items()]
    flags = [f"--config={cell.config}", *flags, f"--compile_for={machine}"]
    key = hashlib.md5(shlex.join(flags).encode()).hexdigest()[:12]
    folder = open_path(root) / ".study" / "compiled" / key
    report = folder / "compile_report.json"
    if not report.exists():
        folder.mkdir(parents=True, exist_ok=True)
        result = subprocess.run(
            [sys.executable, str(pages.repository() / "train.py"), *flags, f"--workdir={folder}"],
            capture_output=True,
            text=True,
        )
        if result.returncode not in (0, EXIT_DOES_NOT_FIT):
            line = (result.stderr.strip().splitlines() or ["no output"])[-1]
            raise UserError(f"{cell.name} can't be compiled for {machine}: {line}")
    content = json.loads(report.read_text())
    predicted = content.get("predicted") or content.get("bound")
    return predicted["step_seconds"] if content["fits"] and predicted else None
