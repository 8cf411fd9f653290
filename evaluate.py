"""Evaluates a run's checkpoint, or published weights: loss, top-1 and top-5 accuracy.

python evaluate.py --workdir=runs/digits
python evaluate.py --workdir=runs/vit_b16 --split=validation --step=90000 --json
python evaluate.py --workdir=runs/vit_b16 --dataset=imagenet_v2 --split=test
python evaluate.py --config=configs/vit_b16.py --config.init_from=B_16.npz --config.image_size=384

Every example of the split counts exactly once. The last command evaluates published weights on
a preset's dataset.
"""

import json

import jax
from absl import flags

import command_line
import input_pipeline
from configs import common
from vit_jax import checks, models, pretrained
from vit_jax.errors import UserError
from vit_jax.evaluation import accuracy
from vit_jax.parallel import feeding
from vit_jax.parallel.mesh import create_mesh, replicated
from vit_jax.parallel.sharding import with_mesh
from vit_jax.runs import checkpoint, run_folder, run_log
from vit_jax.runs.checkpoint_items import check_shapes
from vit_jax.training import steps, train_state
from vit_jax.training.program import eval_batch_size

flags.adopt_module_key_flags(command_line)
DATASET = flags.DEFINE_string(
    "dataset", None, "A TFDS name or a folder. Default: the configuration's dataset.name."
)
DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "Where TFDS keeps its datasets. Default: the configuration's."
)
STEP = flags.DEFINE_integer("step", None, "The checkpoint's step. Default: the latest.")
SPLIT = flags.DEFINE_string(
    "split", None, "The dataset's split. Default: the configuration's dataset.eval_split."
)


def evaluate(
    workdir,
    step: int | None = None,
    split: str | None = None,
    *,
    name: str | None = None,
    data_dir: str | None = None,
) -> dict[str, float]:
    """Evaluates a run's checkpoint, with the average of its parameters if the run keeps one.

    Args:
        workdir: the run's folder.
        step: the checkpoint's step; None: the latest.
        split, name, data_dir: another dataset with the same classes; see `select_dataset`.

    Returns:
        loss, accuracy and accuracy_top5.

    Raises:
        UserError: an unknown run, checkpoint, dataset or split.
    """
    config, params = checkpoint.restore_params(workdir, step)
    select_dataset(config, name, data_dir, split)
    check(config)
    eval_set = open_eval_set(config.dataset, run_folder.read_class_names(workdir))
    model, image_shape = models.from_config(config), input_pipeline.image_shape(config)
    expected = jax.eval_shape(lambda: train_state.init_params(model, image_shape, 0))
    check_shapes(workdir, params, expected)
    return evaluate_params(config, model, params, eval_set)


def open_eval_set(dataset, class_names: tuple[str, ...] | None):
    """Opens the evaluation split of `config.dataset`, whose labels number the run's classes.

    Args:
        dataset: `config.dataset`.
        class_names: those of the run; None: those of the training split.
    """
    location = (dataset.name, dataset.data_dir)
    if class_names is None:
        class_names = input_pipeline.open_source(*location, dataset.train_split).class_names
    return input_pipeline.open_source(*location, dataset.eval_split, class_names)


def check(config) -> None:
    """Checks a recorded configuration; what it lacks, since the code was older, has its default."""
    complete = common.get_config()
    with complete.unlocked(), complete.ignore_type():
        complete.update(config)
    checks.check_values(complete, common.get_config())
    input_pipeline.check(complete)
    steps.check(complete)


def evaluate_weights(
    config,
    split: str | None = None,
    *,
    name: str | None = None,
    data_dir: str | None = None,
) -> dict[str, float]:
    """Evaluates the weights in `config.init_from` on the configuration's dataset.

    Args:
        config: a preset's configuration.
        split, name, data_dir: another dataset with the same classes; see `select_dataset`.

    Raises:
        UserError: unknown weights, dataset or split, or weights of a different model.
    """
    config = config.copy_and_resolve_references()
    select_dataset(config, name, data_dir, split)
    input_pipeline.check(config)
    pretrained.check(config)
    eval_set = open_eval_set(config.dataset, None)
    config.num_classes = eval_set.num_classes
    model, shape = models.from_config(config), input_pipeline.image_shape(config)
    params = pretrained.from_config(config, model, shape, new_head=False)
    return evaluate_params(config, model, params, eval_set)


def select_dataset(
    config, name: str | None = None, data_dir: str | None = None, split: str | None = None
) -> None:
    """Sets the dataset to evaluate on; what is None stays as configured.

    Args:
        config: the configuration, changed in place.
        name: a TFDS name or a folder: `dataset.name`.
        data_dir: `dataset.data_dir`.
        split: `dataset.eval_split`.
    """
    fields = dict(name=name, data_dir=data_dir, eval_split=split)
    with config.ignore_type():
        config.dataset.update({field: value for field, value in fields.items() if value})
    if name and split:  # the dataset may lack the split that the run was trained on
        config.dataset.train_split = split


def evaluate_params(config, model, params, eval_set) -> dict[str, float]:
    """Evaluates parameters on an evaluation set, as configured."""
    mesh = create_mesh()
    eval_step = jax.jit(with_mesh(steps.make_eval_step(model, config), mesh))
    batches = input_pipeline.eval_batches(
        eval_set,
        config,
        batch_size=eval_batch_size(config, mesh),
        share_index=jax.process_index(),
        num_shares=jax.process_count(),
    )
    params = jax.device_put(jax.device_get(params), replicated(mesh))
    result = accuracy.evaluate(eval_step, params, feeding.to_devices(batches, mesh))
    input_pipeline.report_corrupt(eval_set)
    return result


def main():
    run_log.start_logging()
    workdir, config = command_line.WORKDIR.value, command_line.CONFIG.value
    dataset = dict(name=DATASET.value, data_dir=DATA_DIR.value, split=SPLIT.value)
    if config is not None and (workdir is not None or STEP.value is not None):
        raise UserError(
            "--config can't be combined with --workdir or --step, which select a checkpoint"
        )
    if workdir is not None:
        values = evaluate(workdir, STEP.value, **dataset)
    elif config is not None and config.init_from:
        values = evaluate_weights(config, **dataset)
    else:
        raise UserError(
            "Nothing to evaluate: set --workdir to a run's folder, or --config to a preset and "
            "--config.init_from to published weights"
        )
    if jax.process_index() != 0:
        return
    if command_line.JSON.value:
        print(json.dumps(values))
    else:
        print("  ".join(f"{name} {value:.4f}" for name, value in values.items()))


if __name__ == "__main__":
    command_line.run(main, needs_config=False)
