"""The numbers of a run's checkpoint on a split: loss, top-1 and top-5, every example once.

python evaluate.py --workdir=runs/digits
python evaluate.py --workdir=runs/vit_b16 --split=validation --step=90000 --json
"""

import json

import jax
from absl import flags

import command_line
import input_pipeline
from vit_jax import checkpoint, metrics, models, run_log, sharding, train_state
from vit_jax.errors import UserError

flags.adopt_module_key_flags(command_line)
STEP = flags.DEFINE_integer("step", None, "Of the checkpoint. Default: the latest.")
SPLIT = flags.DEFINE_string("split", None, "Default: the run's dataset.eval_split.")
JSON = flags.DEFINE_bool("json", False, "Prints a JSON object for programs.")


def evaluate(workdir, step: int | None = None, split: str | None = None) -> dict[str, float]:
    """loss, accuracy and accuracy_top5 of a checkpoint (the average, where the run keeps one).

    Raises:
        UserError: no such run, checkpoint, dataset or split.
    """
    config, params = checkpoint.restore_params(workdir, step)
    config.dataset.eval_split = split or config.dataset.eval_split
    mesh = sharding.create_mesh()
    _, eval_set = input_pipeline.open_splits(config.dataset)
    eval_step = jax.jit(train_state.make_eval_step(models.from_config(config), config))
    batches = input_pipeline.eval_batches(
        eval_set,
        config,
        batch_size=train_state.eval_batch_size(config, mesh),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    params = jax.device_put(params, sharding.replicated(mesh))
    result = metrics.evaluate(eval_step, params, sharding.to_devices(batches, mesh))
    input_pipeline.report_damaged(eval_set)
    return result


def main():
    run_log.start_logging()
    workdir = command_line.WORKDIR.value
    if workdir is None:
        raise UserError("--workdir=FOLDER is missing: the run to evaluate")
    values = evaluate(workdir, STEP.value, SPLIT.value)
    if JSON.value:
        print(json.dumps(values))
    else:
        print("  ".join(f"{name} {value:.4f}" for name, value in values.items()))


if __name__ == "__main__":
    command_line.run(main)
