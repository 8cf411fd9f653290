"""Images in, classes out: what a model and an exported artifact have in common."""

import abc
from collections.abc import Callable, Sequence

import jax
import numpy as np

from vit_jax.checks import Range, check_class_names, check_eval_view, check_range, size_pair
from vit_jax.errors import UserError
from vit_jax.inference.images import evaluation_view, is_pillow

BATCH_SIZE = 32


class Predictor(abc.ABC):
    """Classifies images by a compiled function of their views.

    Attributes:
        params: the first argument of `forward`.
        image_size: (height, width) that the model sees.
        channels: 1 or 3.
        num_classes: the number of classes.
        class_names: in the order of the labels, or None.
        eval_crop, eval_method: how the model sees images, see `evaluation_view`.
    """

    params: dict
    image_size: tuple[int, int]
    channels: int
    num_classes: int
    class_names: tuple[str, ...] | None
    eval_crop: float | str
    eval_method: str

    @property
    @abc.abstractmethod
    def forward(self) -> Callable:
        """The compiled function (params, uint8 (N, H, W, C)) -> probabilities (N, num_classes)."""

    def check_settings(self) -> None:
        """Raises UserError for settings of preprocessing that aren't valid."""
        object.__setattr__(self, "image_size", size_pair("image_size", self.image_size))
        check_eval_view(self.eval_crop, self.eval_method)

    def check_classes(self) -> None:
        """Raises UserError if there isn't a name for each class."""
        check_class_names(self.class_names, self.num_classes)

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

    def top_classes(self, probabilities: np.ndarray, top: int = 5) -> list[tuple[str, float]]:
        """Returns the `top` largest of probabilities (num_classes,) as (name, probability)."""
        order = np.argsort(-probabilities, kind="stable")[:top]
        return [(self.class_name(i), float(probabilities[i])) for i in order]

    def class_name(self, label: int) -> str:
        return self.class_names[label] if self.class_names else f"class {label}"

    def probabilities(self, images) -> np.ndarray:
        """Returns float32 (N, num_classes); see `__call__` for `images`."""
        return self.map_batches(self.forward, images, BATCH_SIZE)

    def views(self, images) -> np.ndarray:
        """Returns images as the model sees them, uint8 (N, *image_size, channels)."""
        view_shape = (*self.image_size, self.channels)
        if is_pillow(images):
            images = [images]
        elif hasattr(images, "__array__"):
            images = np.asarray(images)
            if images.ndim == 3 and self.channels == images.shape[0] == 3 != images.shape[-1]:
                raise UserError(
                    f"The images are {images.shape}: a color image must be (H, W, 3), and three "
                    "gray ones (3, H, W, 1)"
                )
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
        """Applies a compiled function of (params, views) to images, in batches.

        Fewer images than `batch_size`, a power of two, are padded to a power of two, so that few
        sizes are ever compiled.
        """
        views = self.views(images)
        batch_size = min(batch_size, next_power_of_two(len(views)))
        shape = jax.ShapeDtypeStruct((1, *views.shape[1:]), views.dtype)
        results = [np.zeros((0, *jax.eval_shape(function, self.params, shape).shape[1:]))]
        for start in range(0, len(views), batch_size):
            batch = views[start : start + batch_size]
            padding = np.zeros((batch_size - len(batch), *batch.shape[1:]), batch.dtype)
            outputs = function(self.params, np.concatenate([batch, padding]))
            results.append(outputs[: len(batch)])
        return np.concatenate(results, dtype=np.float32)


def next_power_of_two(number: int) -> int:
    """Returns the smallest power of two that is at least `number` and 1."""
    return 1 << max(number - 1, 0).bit_length()
