"""Loss and accuracy over an evaluation set.

Other kinds of evaluation go into files of their own here. They can't open datasets: `evaluate` in
train.py and `evaluate_params` in evaluate.py pass them batches, and add their numbers to the
results, such as results["val"]["knn_accuracy"]. What they need besides, such as the training set,
becomes a field of `Run`. Like `evaluate` here, they take a compiled step (see `Program.eval_step`)
and ask `stop_requested` before each batch. Outputs for each example, such as features, must be on
all processes: `out_shardings=replicated(mesh)`. Only metrics of vit_jax/training/metrics.py can be
`config.best_metric`.
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
