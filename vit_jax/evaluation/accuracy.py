"""Loss and accuracy over an evaluation set.

To add another kind of evaluation, write a file like this one beside it, with a function like
`evaluate`: (compiled function, params, batches, stop_requested) -> a dictionary of numbers, or None
as soon as `stop_requested()` returns True. Call it in `evaluate` in train.py after
`accuracy.evaluate`. If it returns None, return None there too; otherwise
`results[name].update(numbers)`. Each number is logged under its key, which must not be one of
`metrics.NAMES`. The same goes for `evaluate_params` in evaluate.py.

The compiled function is a property of `Program` (vit_jax/training/program.py), like `eval_step`. It
normalizes images by `augment.normalize`. To return something for each example, such as features,
return the batch's labels and mask with it, and compile with `out_shardings=replicated(mesh)`, so
that every process gets all of them.

An evaluation that needs the training set, such as kNN, takes its batches as one more argument: an
`input_pipeline.EvalBatches` of it, fed by `feeding.to_devices`; train.py keeps it as a field of
`Run`. evaluate.py has neither `Run` nor `Program`: `evaluate_params` opens what it needs and
compiles the function, as it does for `eval_step`. Only a metric of vit_jax/training/metrics.py can
be `config.best_metric`.
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
