"""What the cells of a study cost before they are run."""

import functools
import hashlib
import json
import pathlib
import subprocess
import sys
from collections.abc import Callable

import jax

from vit_jax import models
from vit_jax.checks import size_pair
from vit_jax.errors import EXIT_DOES_NOT_FIT, UserError
from vit_jax.runs import resuming
from vit_jax.storage.files import open_path
from vit_jax.studies import launching, pages
from vit_jax.training import optim, schedules

# (examples of the split "train", classes): a study is counted before its datasets are prepared.
DATASETS = {
    "imagenet2012": (1_281_167, 1000),
    "imagenet21k": (None, 21_843),  # its users split it
    "cifar10": (50_000, 10),
    "cifar100": (50_000, 100),
    "oxford_iiit_pet": (3_680, 37),
    "oxford_flowers102": (1_020, 102),
    "digits": (1_442, 10),
}
ASSUMED_CLASSES = 1000  # of other datasets
# What a compiled step doesn't depend on: cells that differ in nothing else are compiled once.
NOT_COMPILED = (
    *("total_steps", "num_epochs", "schedule", "seed", "init_from", "init_mode"),
    *("dataset.examples", "dataset.examples_seed", "dataset.examples_balanced"),
    *("dataset.train_split", "dataset.eval_split", "optimizer.weight_decay"),
)


def cost(cell: pages.Cell, root, count: Callable[[object, tuple], tuple[int, int]]) -> dict:
    """Returns what a cell costs.

    Args:
        cell: the cell.
        root: the study's folder.
        count: (model, image shape) -> (parameters, FLOPs of the forward pass of one image).

    Returns:
        variant; params; gflops, of one image forward; images that it sees; exaflops, three times
        the forward passes'; steps. images, exaflops and steps are None if the dataset's size
        decides and isn't known. assumed: the dataset whose classes are taken to be
        ASSUMED_CLASSES; None if they are known.

    Raises:
        UserError: as `check_cell`.
    """
    config, model, shape = check_cell(cell, root)
    assumed = None
    if models.predicts_classes(config) and not num_classes(config):
        assumed = config.dataset.name
    params, flops = count(model, shape)
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
        assumed=assumed,
    )


def check_cell(cell: pages.Cell, root) -> tuple:
    """Checks what can be known of a cell before its dataset is opened.

    Returns:
        Its configuration, its model, and the shape of an image, (height, width, channels).

    Raises:
        UserError: the model, the optimizer or the schedule is invalid.
    """
    config = pages.configured(cell.config, cell.overrides(root))
    try:
        optim.check(config)
        schedules.check(config.schedule)
        shape = (*size_pair("config.image_size", config.image_size), config.dataset.channels)
        config_of_model = config.copy_and_resolve_references()
        config_of_model.num_classes = num_classes(config) or ASSUMED_CLASSES
        model = models.from_config(config_of_model)
        models.check_image(model, shape[:2])
    except UserError as error:
        raise UserError(f"{cell.name}: {error}") from None
    return config, model, shape


def num_classes(config) -> int | None:
    """Returns how many classes a cell's model has; None if that isn't known without its dataset."""
    return config.num_classes or DATASETS.get(config.dataset.name, (None, None))[1]


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
    examples, _ = DATASETS.get(config.dataset.name, (None, None))
    if config.dataset.train_split != "train":
        examples = None
    if chosen := config.dataset.examples:
        examples = chosen if chosen > 1 else examples and round(chosen * examples)
    return examples and round(config.num_epochs * examples / config.batch_size)


def step_seconds(cell: pages.Cell, root, machine: str) -> float | None:
    """Returns the seconds of a cell's training step on a machine, as --compile_for predicts.

    Reports are kept below <root>/.study/, so that each program is compiled once by each version of
    the code and of JAX.

    Args:
        machine: such as "v5e:4x4".

    Returns:
        The prediction, for GPUs a lower bound; None if the run doesn't fit.

    Raises:
        UserError: it can't be compiled.
    """
    fields = cell.overrides(root)
    config = pages.configured(cell.config, fields)
    if models.predicts_classes(config) and (known := num_classes(config)):
        fields["num_classes"] = config.num_classes = known
    flags = [f"--config.{name}={launching.flag_value(value)}" for name, value in fields.items()]
    flags = [f"--config={cell.config}", *flags, f"--compile_for={machine}"]
    folder = open_path(root) / ".study" / "compiled" / program_key(config, machine)
    report = folder / "compile_report.json"
    if not report.exists():
        folder.mkdir(parents=True, exist_ok=True)
        result = subprocess.run(
            [sys.executable, str(pages.repository() / "train.py"), *flags, f"--workdir={folder}"],
            capture_output=True,
            text=True,
        )
        if result.returncode not in (0, EXIT_DOES_NOT_FIT) or not report.exists():
            line = (result.stderr.strip().splitlines() or ["no output"])[-1]
            raise UserError(f"{cell.name} can't be compiled for {machine}: {line}")
    content = json.loads(report.read_text())
    predicted = content.get("predicted") or content.get("bound")
    return predicted["step_seconds"] if content["fits"] and predicted else None


def program_key(config, machine: str) -> str:
    """Returns what tells the compiled program of a run from others."""
    fields = resuming.as_flat_dict(config).items()
    compiled = {name: value for name, value in fields if not resuming.is_in(name, NOT_COMPILED)}
    versions = [jax.__version__, digest_of_code(pages.repository()), machine]
    content = json.dumps([compiled, *versions], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


@functools.cache
def digest_of_code(folder: pathlib.Path) -> str:
    """Returns a digest of the code that compiles a run's steps."""
    digest = hashlib.sha256()
    for path in [folder / "train.py", *sorted((folder / "vit_jax").rglob("*.py"))]:
        digest.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return digest.hexdigest()
