"""Checks the configuration of a run, and fills in what follows from its dataset."""

from ml_collections import ConfigDict

import input_pipeline
from configs import common
from vit_jax import checks, models, objectives, pretrained
from vit_jax.errors import UserError
from vit_jax.evaluation import evals
from vit_jax.logs import run_log
from vit_jax.runs import branch, checkpoint, run_folder
from vit_jax.training import optim, schedules, steps


def check(config: ConfigDict) -> None:
    """Checks the whole configuration, before anything is opened or created.

    Raises:
        UserError: naming the field, its value and what it must be.
    """
    checks.check_is_config(config)
    checks.check_values(config, common.get_config())
    input_pipeline.check(config)
    model = models.from_config(config)
    image_shape = input_pipeline.image_shape(config)
    models.check_image(model, image_shape[:2])
    objectives.check(config, model, image_shape)
    evals.check(config, model.depth)
    steps.check(config)
    optim.check(config)
    schedules.check(config.schedule)
    pretrained.check(config)
    branch.check(config)
    checkpoint.check(config)
    run_log.check(config)
    if config.num_epochs is None and config.total_steps is None:
        raise UserError("Neither config.num_epochs nor config.total_steps is set: set one")


def check_weights_given(config: ConfigDict, workdir) -> None:
    """Raises UserError if a new run needs weights to start from, and the configuration has none."""
    lacks_weights = config.init_from_required and not config.init_from
    if lacks_weights and not run_folder.checkpoint_steps(workdir):
        raise UserError(config.init_from_hint)


def resolve(
    config: ConfigDict, train_set, order: str | None = None, parts: int | None = None
) -> ConfigDict:
    """Fills in the fields that depend on the dataset, and on the order that a run began with.

    Args:
        config: the run's configuration.
        train_set: the training split.
        order, parts: what the run that is resumed has recorded in `config.dataset`.

    Raises:
        UserError: fields that the dataset determines are set to other values, or it is too small
            for one step, or has only one class to predict.
    """
    config = config.copy_and_resolve_references()
    if train_set.num_classes == 1 and models.predicts_classes(config):
        raise UserError(
            f"{train_set.name} has a single class, {train_set.class_names[0]!r}, so there is "
            "nothing to learn; a folder of images has one folder per class: <split>/<class>/*.jpg"
        )
    check_filled_in("num_classes", config.num_classes, train_set.num_classes, train_set.name)
    config.num_classes = train_set.num_classes
    with config.ignore_type():  # it may be True
        config.model.representation_size = models.from_config(config).representation_size
    order, parts = input_pipeline.shuffle_order(train_set, config, order, parts)
    resolved = dict(
        order=order,
        parts=parts,
        num_examples=train_set.num_examples,
        fingerprint=train_set.fingerprint,
    )
    for field, value in resolved.items():
        check_filled_in(f"dataset.{field}", config.dataset[field], value, train_set.name)
    config.dataset.update(resolved)
    if config.total_steps is None:
        num_seen = config.num_epochs * train_set.num_examples - config.dataset.offset
        config.total_steps = round(num_seen / config.batch_size)
    if config.total_steps not in checks.COUNT:
        raise UserError(
            f"The run would have {config.total_steps:,} steps, and must have {checks.COUNT}: set "
            "config.total_steps, or change config.num_epochs"
        )
    return config


def check_filled_in(field: str, value, resolved, name: str) -> None:
    """Raises UserError if a field that the dataset `name` determines was set to another value."""
    if value not in (None, resolved):
        raise UserError(
            f"config.{field} is {value!r}, but {name} makes it {resolved!r}: leave it unset"
        )
