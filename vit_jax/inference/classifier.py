"""A trained model as a function from images to classes."""

import dataclasses
import functools

import jax
import numpy as np

from vit_jax import models, pretrained
from vit_jax.errors import UserError
from vit_jax.inference.images import evaluation_view
from vit_jax.models import VisionTransformer
from vit_jax.pretrained import weights
from vit_jax.pretrained.weights import KEEP, MEAN, STD
from vit_jax.training import augment

BATCH_SIZE = 32


@dataclasses.dataclass(frozen=True)
class Classifier:
    """`Classifier.load(path)(images)` -> for each image its best classes with probabilities.

    Attributes:
        model, params: with a head; the parameters on the device.
        image_size: (height, width) that the model sees.
        class_names: in the order of the classes, or None.
        mean, std: of the normalisation of pixels in [0, 1].
        keep: the part of the resized image's shorter side that is seen.
        loss: what the model was trained with: "softmax", or "sigmoid" for probabilities of each
            class by itself.
    """

    model: VisionTransformer
    params: dict
    image_size: tuple[int, int]
    channels: int = 3
    class_names: tuple[str, ...] | None = None
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    keep: float = KEEP
    loss: str = "softmax"

    def __post_init__(self):
        classes, names = self.model.num_classes, self.class_names
        if not classes:
            raise UserError("The model has no head: it gives features, not classes")
        if self.model.pool == "none":
            raise UserError("The model has pool 'none', and gives classes for each patch")
        if names is not None and len(names) != classes:
            raise UserError(f"There are {len(names)} class names for a model of {classes} classes")

    @classmethod
    def load(cls, path, image_size=None, class_names=None, *, num_heads=None, grid=None):
        """From anything that `pretrained.load` takes; the model is the one the file is of.

        Args:
            path: a run's folder, a published file, `hf:owner/name`, ...
            image_size: (height, width), or an edge; None: the file's, or of its positions.
            class_names: in the order of the classes; None: the file's, where it has them.
            num_heads, grid: where the file doesn't tell; see `pretrained.load`.

        Raises:
            UserError: as `pretrained.load`; a model without classes, or with other ones.
        """
        found = weights.read(path, num_heads)
        model = models.create("B/16", **found.model_fields)
        if isinstance(image_size, int):
            image_size = (image_size, image_size)
        image_size = image_size or pretrained.image_size_of(found, model, grid)
        params = pretrained.load(found, model, image_size, grid=grid, new_head=False)
        return cls.of(found, model, params, image_size, class_names)

    @classmethod
    def of(cls, found: weights.Weights, model, params, image_size, class_names=None, **about):
        """Of a model whose parameters come from `found`; `about`: fields that differ from its."""
        told = {name: getattr(found, name) for name in ("mean", "std", "keep", "loss")}
        told = {name: value for name, value in told.items() if value is not None}
        return cls(
            model=model,
            params=jax.device_put(params),
            image_size=tuple(image_size),
            channels=found.channels,
            class_names=tuple(class_names or found.class_names or ()) or None,
            **told | about,
        )

    def __call__(self, images, top: int = 5) -> list[list[tuple[str, float]]]:
        """The best classes of each image, best first, as (name, probability).

        images: uint8 (N, H, W, C), or a list of images of any size, as arrays or PIL's; one by
            itself counts as a list of it.
        """
        return [self.best(row, top) for row in self.probabilities(images)]

    def best(self, probabilities: np.ndarray, top: int = 5) -> list[tuple[str, float]]:
        """(C,) -> the `top` largest, as (name, probability)."""
        order = np.argsort(-probabilities, kind="stable")[:top]
        return [(self.name(i), float(probabilities[i])) for i in order]

    def name(self, index: int) -> str:
        return self.class_names[index] if self.class_names else f"class {index}"

    def probabilities(self, images) -> np.ndarray:
        """float32 (N, num_classes)."""
        return self.batched(self.forward, images, BATCH_SIZE)

    def attention(self, images) -> np.ndarray:
        """Where the model looks: float32 (N, rows, columns), each summing to 1 over its patches.

        Attention rollout; see `rollout.attention_rollout`.
        """
        return self.batched(self.rollout, images, 4)

    def views(self, images) -> np.ndarray:
        """What the model sees of them: uint8 (N, *image_size, channels)."""
        size = (*self.image_size, self.channels)
        shape = images.shape if isinstance(images, np.ndarray) else ()
        if hasattr(images, "convert") or (len(shape) == 3 and shape[-1] in (3, 4)):
            images = [images]  # one by itself
        if isinstance(images, np.ndarray) and images.shape[1:] == size and images.dtype == np.uint8:
            return images
        see = functools.partial(
            evaluation_view, size=self.image_size, channels=self.channels, keep=self.keep
        )
        return np.stack([see(image) for image in images]) if len(images) else np.zeros((0, *size))

    def batched(self, function, images, size: int) -> np.ndarray:
        """The function of all images' views, computed on `size` of them at a time."""
        views = self.views(images)
        size = min(size, max(len(views), 1))
        results = [np.zeros((0, *jax.eval_shape(function, self.params, views[:0]).shape[1:]))]
        for start in range(0, len(views), size):
            part = views[start : start + size]
            rest = np.zeros((size - len(part), *part.shape[1:]), part.dtype)
            results.append(function(self.params, np.concatenate([part, rest]))[: len(part)])
        return np.concatenate(results, dtype=np.float32)

    @functools.cached_property
    def forward(self):
        """(params, uint8 (N, H, W, C)) -> probabilities (N, num_classes), compiled."""
        activation = jax.nn.sigmoid if self.loss == "sigmoid" else jax.nn.softmax

        def forward(params, images):
            images = augment.normalize(images, self.mean, self.std)
            return activation(self.model.apply({"params": params}, images))

        return jax.jit(forward)

    @functools.cached_property
    def rollout(self):
        """(params, uint8 (N, H, W, C)) -> attention (N, rows, columns), compiled."""

        def rollout(params, images):
            images = augment.normalize(images, self.mean, self.std)
            capture = ("attention",)
            _, captured = self.model.apply({"params": params}, images, capture=capture)
            has_class_token = self.model.pool == "cls"
            maps = rollout.attention_rollout(captured["attention"], has_class_token)
            return maps.reshape(-1, *self.model.grid(self.image_size))

        return jax.jit(rollout)
