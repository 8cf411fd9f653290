"""Loss and accuracy over an evaluation set: as sums, or with what is predicted for each example."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.errors import UserError
from vit_jax.evaluation import statistics
from vit_jax.training import augment, losses, metrics

COLUMNS = ("index", "labels", "mask")  # of a batch, for `collect`


def evaluate(
    eval_step: Callable,
    params,
    batches: Iterable[dict],
    stop_requested: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Returns the metrics over all batches; each real example counts once.

    Args:
        eval_step: (params, batch) -> sums over the batch, such as `metrics.batch_sums`.
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
    """Returns the mean of each metric over all examples, from a list of sums over batches.

    Each has some of `metrics.NAMES` or `metrics.MASKED_NAMES`, `count`, and `unlabeled` if labels
    may be missing.

    Raises:
        UserError: labels that aren't among the classes, as in splits published without labels.
    """
    sums = jax.device_get(sums)

    def total(name):
        return np.sum([batch[name] for batch in sums], dtype=np.float64)

    count = total("count")
    if "unlabeled" in sums[0]:
        check_labeled(int(total("unlabeled")), int(count))
    known = dict.fromkeys((*metrics.NAMES, *metrics.MASKED_NAMES))
    names = [name for name in known if name in sums[0]]
    return {name: float(total(name) / count) for name in names}


def make_label_set_step(model, config) -> Callable:
    """Returns the function (params, batch) -> sums of a batch whose examples have sets of labels.

    An example is right if the most probable class is in its set; examples with an empty set don't
    count, as for ReaL (arXiv:2006.07159, section 3).

    Args:
        model: the VisionTransformer.
        config: a run's configuration, of which `augment.mean` and `augment.std` are used.
    """

    def step(params, batch):
        images = augment.normalize(batch["images"], config.augment.mean, config.augment.std)
        logits = model.apply({"params": params}, images, train=False)
        labels = batch["labels"]  # (N, max_labels), padded with -1
        hits = (labels == jnp.argmax(logits, axis=-1)[:, None]).any(axis=1)
        counts = batch["mask"] & (labels >= 0).any(axis=1)
        return {
            "accuracy": jnp.sum(hits & counts, dtype=jnp.float32),
            "count": jnp.sum(counts, dtype=jnp.float32),
        }

    return step


def check_labeled(unlabeled: int, count: int) -> None:
    """Raises UserError if some of `count` examples have a label that isn't among the classes."""
    if unlabeled:
        raise UserError(
            f"{unlabeled} of {count} evaluation examples have a label that isn't among the "
            "classes: use a split with labels"
        )


class Predictions(NamedTuple):
    """What a model predicts for each example of a set, in the set's order.

    Attributes:
        index: the number of each example in the set, int32 (N,).
        labels: int32 (N,).
        top: the classes with the highest probabilities, the highest first, int32 (N, up to 5).
        confidence: the probability of the first of them, float32 (N,).
        loss: float32 (N,).
    """

    index: np.ndarray
    labels: np.ndarray
    top: np.ndarray
    confidence: np.ndarray
    loss: np.ndarray

    @property
    def correct(self) -> np.ndarray:
        """Whether the most probable class is the right one, bool (N,)."""
        return self.top[:, 0] == self.labels

    def metrics(self) -> dict[str, float]:
        """Returns loss, accuracy, accuracy_top5, and ece, the expected calibration error."""
        in_top = (self.top == self.labels[:, None]).any(axis=1)
        return {
            "loss": float(self.loss.mean(dtype=np.float64)),
            "accuracy": float(self.correct.mean()),
            "accuracy_top5": float(in_top.mean()),
            "ece": statistics.calibration_error(self.confidence, self.correct),
        }

    def intervals(self) -> dict[str, tuple[float, float]]:
        """Returns the 95% bootstrap intervals of the means among `metrics`.

        The calibration error has none: that of a sample drawn with replacement is larger.
        """
        in_top = (self.top == self.labels[:, None]).any(axis=1)
        values = {"loss": self.loss, "accuracy": self.correct, "accuracy_top5": in_top}

        def means(rows):
            return {name: float(value[rows].mean()) for name, value in values.items()}

        return statistics.bootstrap_intervals(means, len(self.labels))

    def select(self, rows) -> "Predictions":
        """Returns the predictions at indices, or where a mask is True."""
        return Predictions(*(values[rows] for values in self))


def make_predict_step(model, config) -> Callable:
    """Returns the function (params, batch) -> the fields of `Predictions`, and the batch's mask.

    Args:
        model: the VisionTransformer.
        config: a run's configuration, of which `loss`, `loss_args`, `augment.mean` and
            `augment.std` are used.
    """
    loss = losses.create(config.loss, config.get("loss_args"))

    def predict_step(params, batch):
        images = augment.normalize(batch["images"], config.augment.mean, config.augment.std)
        logits = model.apply({"params": params}, images, train=False)
        _, top = jax.lax.top_k(logits, min(5, model.num_classes))
        targets = augment.soft_labels(batch["labels"], model.num_classes)
        return {
            "top": top,
            "confidence": jnp.max(loss.probabilities(logits), axis=-1),
            "loss": loss.function(logits, targets),
            **{name: batch[name] for name in COLUMNS},
        }

    return predict_step


def predict(predict_step: Callable, params, batches: Iterable[dict], num_classes: int):
    """Returns the `Predictions` for all examples; see `collect`.

    Args:
        predict_step: of `make_predict_step`, compiled with replicated outputs.
        params, batches, num_classes: see `collect`.
    """
    outputs = collect(predict_step, params, batches, num_classes)
    return Predictions(**{name: outputs[name] for name in Predictions._fields})


def collect(
    step: Callable,
    params,
    batches: Iterable[dict],
    num_classes: int,
    stop_requested: Callable[[], bool] = lambda: False,
) -> dict[str, np.ndarray] | None:
    """Returns what a step computes for each example, in the order of the set, on every process.

    Args:
        step: (params, batch) -> arrays with a row for each example, among them the batch's
            `index`, `labels` and `mask`; compiled with replicated outputs.
        params: the model's parameters.
        batches: global batches on the devices.
        num_classes: how many classes the labels number.
        stop_requested: called before each batch; if it returns True, None is returned.

    Raises:
        UserError: labels that aren't among the classes.
    """
    parts = []
    for batch in batches:
        if stop_requested():
            return None
        parts.append(step(params, batch))
        if len(parts) > 2:  # two batches are dispatched ahead; the others don't stay on the device
            parts[-3] = jax.device_get(parts[-3])
    parts = jax.device_get(parts)
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    rows = np.flatnonzero(columns["mask"])
    rows = rows[np.argsort(columns["index"][rows])]
    columns = {name: values[rows] for name, values in columns.items()}
    outside = (columns["labels"] < 0) | (columns["labels"] >= num_classes)
    check_labeled(int(outside.sum()), len(outside))
    return columns
