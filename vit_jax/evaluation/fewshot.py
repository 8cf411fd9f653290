"""Few-shot accuracy of frozen features, by ridge regression (arXiv:2010.11929, section 4.1)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.checks import COUNT, NON_NEGATIVE, Range
from vit_jax.errors import UserError
from vit_jax.evaluation.embeddings import Embeddings, Whitening

RANGES = {"shots": COUNT, "seeds": Range(1, 100, whole=True), "l2": NON_NEGATIVE}


def evaluate(
    train: Embeddings,
    test: Embeddings,
    num_classes: int,
    *,
    shots: tuple[int, ...] = (1, 5, 10, 25),
    seeds: int = 3,
    l2: float = 1024.0,
) -> dict[str, float]:
    """Returns the accuracy on `test` of linear classifiers fitted to a few examples per class.

    The classifier is the closed-form solution of a regularized least-squares regression to targets
    of -1 and 1, from features that are whitened by the mean and standard deviation of these few
    examples, and a constant feature for the bias.

    Args:
        train: the examples to draw from.
        test: the examples to classify.
        num_classes: how many classes the labels number.
        shots: how many examples of each class to draw; each gives an accuracy.
        seeds: how many times to draw. The draws of a seed are nested: those of 1 are among those
            of 5.
        l2: the weight of the regularization, added to the diagonal of the Gram matrix.

    Returns:
        For each number k of shots `accuracy_<k>shot`, the mean over the seeds, and
        `accuracy_<k>shot_std`, their standard deviation.

    Raises:
        UserError: a class has fewer than `max(shots)` training examples.
    """
    check_shots(train.labels, num_classes, max(shots))
    results = {}
    for count in shots:
        accuracies = []
        for seed in range(seeds):
            rows = draw(train.labels, num_classes, count, seed)
            weights = fit(train.features[rows], train.labels[rows], num_classes, l2)
            predictions = classify(weights, test.features)
            accuracies.append(float(np.mean(np.asarray(predictions) == test.labels)))
        results[f"accuracy_{count}shot"] = float(np.mean(accuracies))
        results[f"accuracy_{count}shot_std"] = float(np.std(accuracies))
    return results


def check(num_examples: int, num_classes: int, *, shots=(1, 5, 10, 25), **_) -> None:
    """Raises UserError if there are too few training examples in all."""
    if num_examples < max(shots) * num_classes:
        raise UserError(
            f"{max(shots)} shots of {num_classes} classes are {max(shots) * num_classes} training "
            f"examples, and there are {num_examples}: lower shots, or choose a larger train_split "
            "or train_examples"
        )


def check_shots(labels: np.ndarray, num_classes: int, shots: int) -> None:
    """Raises UserError if a class has fewer examples than are to be drawn of it."""
    counts = np.bincount(labels, minlength=num_classes)
    if counts.min() < shots:
        raise UserError(
            f"Class {counts.argmin()} has {counts.min()} training examples, and {shots} shots need "
            f"{shots} of every class: lower shots, or choose a larger train_split or train_examples"
        )


def draw(labels: np.ndarray, num_classes: int, shots: int, seed: int) -> np.ndarray:
    """Returns the rows of `shots` examples of each class, int (num_classes * shots,)."""
    rng = np.random.default_rng(seed)
    return np.concatenate(
        [rng.permutation(np.flatnonzero(labels == i))[:shots] for i in range(num_classes)]
    )


@functools.partial(jax.jit, static_argnames="num_classes")
def fit(features, labels, num_classes: int, l2: float):
    """Fits a classifier in closed form.

    Args:
        features: float32 (N, D).
        labels: int (N,).
        num_classes: the number C of classes.
        l2: see `evaluate`.

    Returns:
        The features' whitening, and weights (D + 1, C), of which the last row is the bias.
    """
    with jax.default_matmul_precision("float32"):
        whitening = Whitening.of(features)
        x = with_bias(whitening(features))  # (N, D + 1)
        targets = 2.0 * jax.nn.one_hot(labels, num_classes) - 1.0  # (N, C)
        if len(x) < x.shape[1]:  # the same solution, from the smaller Gram matrix
            gram = x @ x.T + l2 * jnp.eye(len(x))  # (N, N)
            weights = x.T @ jax.scipy.linalg.solve(gram, targets, assume_a="pos")
        else:
            gram = x.T @ x + l2 * jnp.eye(x.shape[1])  # (D + 1, D + 1)
            weights = jax.scipy.linalg.solve(gram, x.T @ targets, assume_a="pos")
    return whitening, weights


def scores(classifier, features):
    """Returns the regression's outputs for features (N, D), (N, C)."""
    whitening, weights = classifier
    return jnp.matmul(with_bias(whitening(features)), weights, precision="float32")


@jax.jit
def classify(classifier, features):
    """Returns the class of each row of features (N, D), int32 (N,)."""
    return jnp.argmax(scores(classifier, features), axis=-1)


def with_bias(x):
    """Appends a column of ones, (N, D) -> (N, D + 1)."""
    return jnp.concatenate([x, jnp.ones((len(x), 1))], axis=1)
