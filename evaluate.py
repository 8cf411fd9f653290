"""The numbers of a run's checkpoint on a split: loss, top-1 and top-5, every example once.

python evaluate.py --workdir=runs/digits
python evaluate.py --workdir=runs/vit_b16 --split=validation --step=90000 --json
"""

import json

import jax
from absl import flags

import command_line
import train
from vit_jax import checkpoint, models, sharding, train_state
from vit_jax.errors import UserError

STEP = flags.DEFINE_integer("step", None, "Of the checkpoint. Default: the latest.")
SPLIT = flags.DEFINE_string("split", None, "Default: the run's dataset.eval_split.")
JSON = flags.DEFINE_bool("json", False, "Prints a JSON object for programs.")


def evaluate(workdir, step: int | None = None, split: str | None = None) -> dict[str, float]:
    """loss, accuracy and accuracy_top5 of a checkpoint (the average, where the run keeps one).

    Raises:
        UserError: no such run, checkpoint, dataset or split.
    """
    config, params = checkpoint.restore_params(workdir, step)
    if split:
        config.dataset.eval_split = split
    mesh = sharding.create_mesh()
    train_state.check_batch_size(config.batch_size, 1, mesh)
    _, eval_set = train.open_splits(config.dataset)
    eval_step = jax.jit(train_state.make_eval_step(models.from_config(config), config))
    params = jax.device_put(params, sharding.replicated(mesh))
    return train.evaluation(eval_step, eval_set, config, mesh, params)


def main():
    if train.WORKDIR.value is None:
        raise UserError("--workdir=FOLDER is missing: the run to evaluate")
    values = evaluate(train.WORKDIR.value, STEP.value, SPLIT.value)
    if JSON.value:
        print(json.dumps(values))
    else:
        print("  ".join(f"{name} {value:.4f}" for name, value in values.items()))


if __name__ == "__main__":
    command_line.run(main, needs_config=False)
