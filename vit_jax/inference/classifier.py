"""A trained model as a function from images to classes."""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Sequence

import jax
import numpy as np

from vit_jax import models, pretrained
from vit_jax.checks import check_normalization, size_pair
from vit_jax.errors import UserError
from vit_jax.inference import features
from vit_jax.inference.predictor import BATCH_SIZE, Predictor
from vit_jax.inference.rollout import attention_rollout
from vit_jax.models import VisionTransformer
from vit_jax.pretrained import weights
from vit_jax.pretrained.weights import EVAL_CROP, EVAL_METHOD, MEAN, STD, Weights
from vit_jax.training import augment, losses

logger = logging.getLogger("vit_jax")

ATTENTION_BATCH_SIZE = 4  # attention weights take L x L numbers per head and block


@dataclasses.dataclass(frozen=True)
class Classifier(Predictor):
    """Classifies images: `Classifier.load("runs/digits")(images)`.

    Attributes:
        model: a VisionTransformer with a head.
        params: its parameters.
        image_size: (height, width) that the model sees.
        channels: 1 or 3.
        class_names: in the order of the labels, or None.
        mean, std: how images are normalized; of pixels in [0, 1].
        eval_crop: the share of the resized image's shorter side that the model sees; or
            "squeeze": the whole image, whose proportions aren't kept.
        eval_method: how images are resized, one of EVAL_METHODS in `vit_jax/checks.py`.
        loss: the loss of the training, a key of LOSSES in `vit_jax/training/losses.py`; it
            determines how logits become probabilities.
    """

    model: VisionTransformer
    params: dict
    image_size: tuple[int, int]
    channels: int = 3
    class_names: tuple[str, ...] | None = None
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    eval_crop: float | str = EVAL_CROP
    eval_method: str = EVAL_METHOD
    loss: str = "softmax"

    def __post_init__(self):
        self.check_classes()
        self.check_settings()
        check_normalization(self.mean, self.std, self.channels)
        losses.create(self.loss)
        self.check_positions()

    @classmethod
    def load(
        cls,
        path,
        image_size: Sequence[int] | int | None = None,
        class_names: Sequence[str] | None = None,
        *,
        num_heads: int | None = None,
        grid: Sequence[int] | None = None,
    ) -> "Classifier":
        """Loads weights and creates the model that they belong to.

        Args:
            path: a run's folder, a published file, `hf:owner/name`, ...; see `pretrained.load`.
            image_size: an int, or (height, width); None: the file's.
            class_names: in the order of the labels; None: the file's, if it has them.
            num_heads: used if the file doesn't specify it.
            grid: (rows, columns) of the file's positions, if the file doesn't specify it.

        Raises:
            UserError: as `pretrained.load`; a model without classes, or another number of names.
        """
        stored = weights.read(path, num_heads)
        stored.check_num_heads(num_heads)
        model = models.create("B/16", **stored.model_fields)
        if image_size is None:
            image_size = pretrained.image_size_of(stored, model, grid)
        image_size = size_pair("image_size", image_size)
        params = pretrained.load(stored, model, image_size, grid=grid, new_head=False)
        return cls.from_weights(stored, model, params, image_size, class_names=class_names)

    @classmethod
    def from_weights(
        cls, stored: Weights, model, params, image_size, *, class_names=None, **settings
    ) -> "Classifier":
        """Creates a classifier from weights that were loaded already.

        Args:
            stored: the contents of the file; its settings are used unless others are given.
            model, params, image_size: see `Classifier`.
            class_names: None: the file's, if it has them.
            **settings: other fields of `Classifier`.
        """
        for name in ("mean", "std", "eval_crop", "eval_method", "loss"):
            if name not in settings and getattr(stored, name) is not None:
                settings[name] = getattr(stored, name)
        if "mean" not in settings:
            stored.warn_of_assumptions()
        return cls(
            model=model,
            params=jax.device_put(params),
            image_size=tuple(image_size),
            channels=stored.channels,
            class_names=class_names if class_names is not None else stored.class_names,
            **settings,
        )

    @property
    def num_classes(self) -> int | None:
        return self.model.num_classes

    def check_classes(self) -> None:
        """Raises UserError if the model doesn't classify images, or has other class names."""
        if not self.model.num_classes:
            raise UserError(
                "The model has no head, so it returns features instead of classes: fine-tune it "
                "first (train.py with --config.init_from), as after training on masked patches"
            )
        if self.model.pool == "none":
            raise UserError("model.pool is 'none', so the model classifies each patch, not images")
        super().check_classes()

    def check_positions(self) -> None:
        """Raises UserError if the parameters are for images of another size."""
        table = self.params.get("Transformer", {}).get("posembed_input")
        length = math.prod(self.model.grid(self.image_size)) + self.model.num_prefix_positions
        if table is not None and table["pos_embedding"].shape[1] != length:
            raise UserError(
                f"image_size is {self.image_size}, but the parameters have positions for "
                f"{table['pos_embedding'].shape[1]} tokens instead of {length}: load them for this "
                "size (`image_size` of Classifier.load or pretrained.load)"
            )

    def attention(self, images) -> np.ndarray:
        """Returns how much each patch contributes: float32 (N, rows, columns), each summing to 1.

        See `attention_rollout` for the method, and `__call__` for `images`.
        """
        return self.map_batches(self.rollout, images, ATTENTION_BATCH_SIZE)

    def patch_features(self, images) -> np.ndarray:
        """Returns one vector per patch, without the class token: float32 (N, rows, columns, D).

        See `vit_jax/inference/features.py`, and `__call__` for `images`.
        """
        return self.map_batches(self.patch_outputs, images, BATCH_SIZE)

    def pooled_features(self, images) -> np.ndarray:
        """Returns one vector per image, the input of the head: float32 (N, D).

        See `vit_jax/inference/features.py`, and `__call__` for `images`.
        """
        return self.map_batches(self.pooled_outputs, images, BATCH_SIZE)

    def of_views(self, function: Callable) -> Callable:
        """Compiles a function of (params, normalized images) to take uint8 views instead."""
        return jax.jit(
            lambda params, views: function(params, augment.normalize(views, self.mean, self.std))
        )

    @functools.cached_property
    def forward(self) -> Callable:
        """The compiled function (params, uint8 (N, H, W, C)) -> probabilities (N, num_classes)."""
        to_probabilities = losses.create(self.loss).probabilities
        return self.of_views(
            lambda params, images: to_probabilities(self.model.apply({"params": params}, images))
        )

    @functools.cached_property
    def rollout(self) -> Callable:
        """The compiled function (params, uint8 (N, H, W, C)) -> attention (N, rows, columns)."""

        def rollout(params, images):
            _, captured = self.model.apply({"params": params}, images, capture=("attention",))
            shares = attention_rollout(
                captured["attention"], self.model.has_class_token, self.model.num_prefix_tokens
            )
            return shares.reshape(-1, *self.model.grid(self.image_size))

        return self.of_views(rollout)

    @functools.cached_property
    def patch_outputs(self) -> Callable:
        """The compiled function (params, uint8 (N, H, W, C)) -> features (N, rows, columns, D)."""
        return self.of_views(functools.partial(features.patch_features, self.model))

    @functools.cached_property
    def pooled_outputs(self) -> Callable:
        """The compiled function (params, uint8 (N, H, W, C)) -> features (N, D)."""
        return self.of_views(functools.partial(features.pooled_features, self.model))
