"""Loss and accuracy over an evaluation set.

To add another kind of evaluation, write a file like this one beside it: a function that takes a
compiled function, parameters and batches, asks `stop_requested` before each batch, and returns a
dictionary of numbers. Call it in `evaluate` in train.py, where `accuracy.evaluate` is called, and
update `results[name]` with what it returns; each number is logged under its key. For the same
numbers from evaluate.py, call it in `evaluate_params` there too.

Datasets are opened in train.py: keep the training set, if you need it, as a field of `Run`. Outputs
per example, such as features, must reach all processes: `out_shardings=replicated(mesh)`. Only a
metric of vit_jax/training/metrics.py can be `config.best_metric`.
"""

from collections.abc import Callable, Iterable

import jax
import numpy as np

from vit_jax.errors import UserError
from vit_jax.training import metrics


def evaluate(
    eval_step: Callable,
    params,
    batches: Iterable[dict],
    stop_requested: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Returns the metrics over all batches; each real example counts once.

    Args:
        eval_step: (params, batch) -> `metrics.batch_sums`.
        batches: global batches on the devices, with a mask.
        stop_requested: called before each batch; if it returns True, None is returned.
    """
    sums = []
    for batch in batches:
        if stop_requested():
            return None
        sums.append(eval_step(params, batch))
        jax.block_until_ready(sums[-3:][0])  # dispatch at most two batches ahead
    return means(sums)


def means(sums: list[dict]) -> dict[str, float]:
    """Returns the mean of each metric over all examples, from a list of `metrics.batch_sums`.

    Raises:
        UserError: labels that aren't among the classes, as in splits published without labels.
    """
    sums = jax.device_get(sums)

    def total(name):
        return np.sum([batch[name] for batch in sums], dtype=np.float64)

    if unlabeled := int(total("unlabeled")):
        raise UserError(
            f"{unlabeled} of {int(total('count'))} evaluation examples have a label that isn't "
            "among the classes: use a split with labels"
        )
    return {name: float(total(name) / total("count")) for name in metrics.NAMES}
