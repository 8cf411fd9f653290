"""A trained model as a function from images to classes."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence

import jax
import numpy as np

from vit_jax import models, pretrained
from vit_jax.checks import (
    Range,
    check_class_names,
    check_eval_view,
    check_normalization,
    check_range,
    size_pair,
)
from vit_jax.errors import UserError
from vit_jax.inference import features
from vit_jax.inference.images import evaluation_view, is_pillow
from vit_jax.inference.rollout import attention_rollout
from vit_jax.models import VisionTransformer
from vit_jax.pretrained import weights
from vit_jax.pretrained.weights import EVAL_CROP, EVAL_METHOD, MEAN, STD, Weights
from vit_jax.training import augment, losses

logger = logging.getLogger("vit_jax")

BATCH_SIZE = 32
ATTENTION_BATCH_SIZE = 4  # attention weights take L x L numbers per head and block


@dataclasses.dataclass(frozen=True)
class Classifier:
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
        object.__setattr__(self, "image_size", size_pair("image_size", self.image_size))
        check_normalization(self.mean, self.std, self.channels)
        check_eval_view(self.eval_crop, self.eval_method)
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

    def __call__(self, images, top: int = 5) -> list[list[tuple[str, float]]]:
        """Returns the `top` most likely classes of each image as (name, probability), best first.

        Args:
            images: uint8 (N, H, W, C) or (N, H, W), or a list of images of any size, each a PIL
                image or uint8 (H, W) or (H, W, C), or one such image. C is 1, 3 or 4; an array of
                three dimensions whose last is 1, 3 or 4 is one image. Arrays may be of NumPy, JAX
                or any library whose arrays NumPy converts.
            top: at least 1; a model with fewer classes returns all.

        Raises:
            UserError: `top` isn't such a number, or an image is none of these, empty or corrupt.
        """
        check_range("top", top, Range(1, whole=True))
        return [self.top_classes(row, top) for row in self.probabilities(images)]

    def check_classes(self) -> None:
        """Raises UserError if the model doesn't classify images, or has other class names."""
        if not self.model.num_classes:
            raise UserError("The model has no head, so it returns features instead of classes")
        if self.model.pool == "none":
            raise UserError("model.pool is 'none', so the model classifies each patch, not images")
        check_class_names(self.class_names, self.model.num_classes)

    def check_positions(self) -> None:
        """Raises UserError if the parameters are for images of another size."""
        table = self.params.get("Transformer", {}).get("posembed_input")
        rows, columns = self.model.grid(self.image_size)
        length = rows * columns + (self.model.pool == "cls")
        if table is not None and table["pos_embedding"].shape[1] != length:
            raise UserError(
                f"image_size is {self.image_size}, but the parameters have positions for "
                f"{table['pos_embedding'].shape[1]} tokens instead of {length}: load them for this "
                "size (`image_size` of Classifier.load or pretrained.load)"
            )

    def top_classes(self, probabilities: np.ndarray, top: int = 5) -> list[tuple[str, float]]:
        """Returns the `top` largest of probabilities (num_classes,) as (name, probability)."""
        order = np.argsort(-probabilities, kind="stable")[:top]
        return [(self.class_name(i), float(probabilities[i])) for i in order]

    def class_name(self, label: int) -> str:
        return self.class_names[label] if self.class_names else f"class {label}"

    def probabilities(self, images) -> np.ndarray:
        """Returns float32 (N, num_classes); see `__call__` for `images`."""
        return self.map_batches(self.forward, images, BATCH_SIZE)

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

    def views(self, images) -> np.ndarray:
        """Returns images as the model sees them, uint8 (N, *image_size, channels)."""
        view_shape = (*self.image_size, self.channels)
        if is_pillow(images):
            images = [images]
        elif hasattr(images, "__array__"):
            images = np.asarray(images)
            if images.ndim < 3 or (images.ndim == 3 and images.shape[-1] in (1, 3, 4)):
                images = images[None]  # one image
            if images.shape[1:] == view_shape and images.dtype == np.uint8:
                return images
        elif not isinstance(images, Sequence) or isinstance(images, str):
            images = [images]  # not an image, as the error says
        if not len(images):
            return np.zeros((0, *view_shape), np.uint8)
        view = (self.image_size, self.channels, self.eval_crop, self.eval_method)
        return np.stack([evaluation_view(image, *view) for image in images])

    def map_batches(self, function: Callable, images, batch_size: int) -> np.ndarray:
        """Applies a compiled function of (params, views) to images in batches of one size."""
        views = self.views(images)
        batch_size = min(batch_size, max(len(views), 1))
        results = [np.zeros((0, *jax.eval_shape(function, self.params, views[:0]).shape[1:]))]
        for start in range(0, len(views), batch_size):
            batch = views[start : start + batch_size]
            padding = np.zeros((batch_size - len(batch), *batch.shape[1:]), batch.dtype)
            outputs = function(self.params, np.concatenate([batch, padding]))
            results.append(outputs[: len(batch)])
        return np.concatenate(results, dtype=np.float32)

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
            shares = attention_rollout(captured["attention"], self.model.pool == "cls")
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
