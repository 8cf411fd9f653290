"""Features of every example of a dataset, for evaluations that fit a classifier to them."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.evaluation.accuracy import COLUMNS, collect
from vit_jax.inference import features
from vit_jax.training import augment

EPSILON = 1e-5  # a feature that varies by less is constant


class Embeddings(NamedTuple):
    """Features float32 (N, D) and labels int32 (N,)."""

    features: np.ndarray
    labels: np.ndarray

    def select(self, rows) -> "Embeddings":
        """Returns the examples at indices, or where a mask is True."""
        return Embeddings(self.features[rows], self.labels[rows])


class Whitening(NamedTuple):
    """Shifts and scales features (N, D) to mean 0 and standard deviation 1 over some examples.

    Attributes:
        mean, scale: float32 (D,); the scale of a feature that is constant is 0.
    """

    mean: jax.Array
    scale: jax.Array

    @classmethod
    def of(cls, features) -> "Whitening":
        """Returns the whitening of some examples' features."""
        std = features.std(axis=0)
        scale = jnp.where(std > EPSILON, 1.0 / (std + EPSILON), 0.0)
        return cls(features.mean(axis=0), scale)

    def __call__(self, features):
        return (features - self.mean) * self.scale


def make_embed_step(model, config, layer: int | None = None) -> Callable:
    """Returns the function (params, batch) -> features, labels and mask of a batch's examples.

    Args:
        model: the VisionTransformer.
        config: a run's configuration, of which `augment.mean` and `augment.std` are used.
        layer: None for what the head gets; or the number of a block, from 1, whose output is
            averaged over the patches.
    """

    def embed_step(params, batch):
        images = augment.normalize(batch["images"], config.augment.mean, config.augment.std)
        if layer is None:
            embedded = features.pooled_features(model, params, images)
        else:
            (maps,) = features.features(model, params, images, layers=(layer,))
            embedded = maps.mean(axis=(1, 2))  # (N, H / P, W / P, D) -> (N, D)
        return {"features": embedded, **{name: batch[name] for name in COLUMNS}}

    return embed_step


def embed(
    embed_step: Callable,
    params,
    batches: Iterable[dict],
    num_classes: int,
    stop_requested: Callable[[], bool] = lambda: False,
) -> Embeddings | None:
    """Returns the features of all examples; see `accuracy.collect` for the other arguments.

    Args:
        embed_step: of `make_embed_step`, compiled with replicated outputs.
    """
    columns = collect(embed_step, params, batches, num_classes, stop_requested)
    return None if columns is None else Embeddings(columns["features"], columns["labels"])
