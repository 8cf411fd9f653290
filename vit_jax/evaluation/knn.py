"""Accuracy of k-nearest-neighbor classification of frozen features."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.checks import COUNT
from vit_jax.errors import UserError
from vit_jax.evaluation.embeddings import Embeddings

RANGES = {"neighbors": COUNT}
SIMILARITIES_AT_ONCE = 2**26  # numbers of 4 bytes


def evaluate(
    train: Embeddings, test: Embeddings, num_classes: int, *, neighbors: int = 20
) -> dict[str, float]:
    """Returns the accuracy on `test` of a vote among the nearest training examples.

    Near means a high cosine similarity. Each neighbor has one vote; of classes with equally many,
    the one with the smallest label wins.

    Args:
        train: the examples to look for neighbors in.
        test: the examples to classify.
        num_classes: how many classes the labels number.
        neighbors: how many neighbors vote.

    Returns:
        `accuracy`.

    Raises:
        UserError: there are fewer training examples than neighbors.
    """
    check(len(train.labels), num_classes, neighbors=neighbors)
    known = normalize(train.features)
    labels = jnp.asarray(train.labels)
    rows = max(1, min(len(test.labels), SIMILARITIES_AT_ONCE // len(train.labels)))
    hits = 0
    for start in range(0, len(test.labels), rows):
        queries = normalize(test.features[start : start + rows])
        predictions = vote(known, labels, queries, neighbors, num_classes)
        hits += np.sum(np.asarray(predictions) == test.labels[start : start + rows])
    return {"accuracy": float(hits / len(test.labels))}


def check(num_examples: int, num_classes: int, *, neighbors: int = 20) -> None:
    """Raises UserError if there are fewer training examples than neighbors."""
    if neighbors > num_examples:
        raise UserError(
            f"neighbors is {neighbors}, and there are {num_examples} training examples: lower it, "
            "or choose a larger train_split"
        )


@functools.partial(jax.jit, static_argnames=("neighbors", "num_classes"))
def vote(known, labels, queries, neighbors: int, num_classes: int):
    """Returns the class of each query by a vote of its neighbors.

    Args:
        known, queries: rows of length 1, (N, D) and (M, D).
        labels: of the known rows, int (N,).
        neighbors, num_classes: see `evaluate`.

    Returns:
        int32 (M,).
    """
    similarity = jnp.matmul(queries, known.T, precision="float32")  # (M, N)
    nearest = jax.lax.top_k(similarity, neighbors)[1]  # (M, neighbors)

    def count(nearest):  # (neighbors,)
        return jnp.bincount(labels[nearest], length=num_classes)

    return jnp.argmax(jax.vmap(count)(nearest), axis=-1)


@jax.jit
def normalize(x):
    """Scales rows (N, D) to length 1."""
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
