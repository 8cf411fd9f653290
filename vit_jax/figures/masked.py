"""Pictures of masked patches: what a model sees of images, and what it predicts."""

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.figures.drawing import create_figure, mean_aspect, show_image
from vit_jax.objectives import masked_patches
from vit_jax.training import augment

MASK_COLOR = 0.5  # of patches that became the [mask] embedding
PANELS = ("image", "corrupted: gray is masked", "predicted", "to be predicted")


def panels(module, params, views, mean, std) -> np.ndarray:
    """Returns each image, what is left of it, and the predicted and the right patches.

    Args:
        module: a MaskedPatchPredictor.
        params: its parameters.
        views: uint8 (N, H, W, C).
        mean, std: how images are normalized.

    Returns:
        For each of PANELS, float32 in [0, 1] (N, H, W, C). In the last two the patches that aren't
        corrupted are those of the image.
    """
    settings, patch, shape = module.settings, module.patch_shape, views.shape[1:]
    grid = module.grid(shape)
    corruption = masked_patches.draw(
        masked_patches.evaluation_keys(jnp.arange(len(views))), grid[0] * grid[1], settings
    )

    @jax.jit
    def predict(params, views):
        images = augment.normalize(views, mean, std)
        outputs = module.apply({"params": params}, images, corruption)
        return masked_patches.predicted_images(outputs, shape, patch, settings)

    expected = masked_patches.targets(jnp.asarray(views), patch, settings)
    if settings.predicts_colors:  # as logits
        expected = jax.nn.one_hot(expected, settings.num_colors(shape[-1]))
        expected = expected.reshape(*expected.shape[:2], -1)
    right = masked_patches.predicted_images(expected, shape, patch, settings)
    images = views.astype(np.float32) / 255
    patches = masked_patches.as_patches(images, patch)
    flat = patches.reshape(len(images), *grid, -1)
    left = corruption.apply(flat, jnp.full(flat.shape[-1], MASK_COLOR))
    left = masked_patches.as_images(left.reshape(patches.shape), shape)
    corrupted = masked_patches.as_images(
        jnp.broadcast_to(corruption.corrupted[:, :, None, None, None], patches.shape), shape
    )
    filled = [jnp.where(corrupted, colors, images) for colors in (predict(params, views), right)]
    return np.stack([images, left, *filled])


def predictions(drawn, captions, title: str = ""):
    """Draws images in columns, each with its panels below each other.

    Args:
        drawn: the result of `panels`.
        captions: N strings.
        title: the text above.

    Returns:
        A matplotlib Figure.
    """
    count = len(captions)
    height = 0.3 + 1.5 * mean_aspect(drawn[0])
    figure = create_figure(title, 1.0 + 1.5 * count, height * len(PANELS) + 0.5)
    axes = figure.subplots(len(PANELS), count, squeeze=False)
    for row, images in enumerate(drawn):
        for column, image in enumerate(images):
            caption = captions[column] if row == 0 else PANELS[row] if column == 0 else ""
            show_image(axes[row, column], np.uint8(np.round(255 * image)), caption, smooth=False)
    return figure
