"""A picture of training batches, as the model and the loss see them."""

from collections.abc import Iterable, Sequence

import numpy as np


def draw(
    batches: Iterable[tuple[np.ndarray, np.ndarray]],
    class_names: Sequence[str],
    title: str,
    path,
    label_smoothing: float = 0.0,
) -> None:
    """Writes a PNG with a row for each batch, and the soft label under each image.

    Args:
        batches: images (N, H, W, C) in [0, 1], and targets (N, num_classes).
        class_names: in the order of the classes.
        title: stands above the images.
        path: of the PNG.
        label_smoothing: the probability spread over all classes; captions leave out classes that
            have no more than their part of it.
    """
    from matplotlib.figure import Figure

    batches = list(batches)
    num_images = len(batches[0][0])
    figure = Figure(figsize=(2 * num_images, 2.65 * len(batches) + 0.6))
    axes = figure.subplots(len(batches), num_images, squeeze=False)
    floor = label_smoothing / len(class_names)
    for step, (images, targets) in enumerate(batches):
        for axis, image, target in zip(axes[step], images, targets, strict=True):
            image = image.squeeze(-1) if image.shape[-1] == 1 else image
            axis.imshow(image, "gray", vmin=0, vmax=1)
            axis.set_xlabel(caption(target, class_names, floor), fontsize=9)
            axis.set(xticks=[], yticks=[])
        axes[step, 0].set_ylabel(f"step {step + 1}", fontsize=9)
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def caption(target: np.ndarray, class_names: Sequence[str], floor: float) -> str:
    """Returns the two largest probabilities above `floor`, and the sum of the others."""
    largest = [i for i in np.argsort(-target, kind="stable")[:2] if target[i] > floor + 5e-4]
    lines = [f"{class_names[i][:16]} {target[i]:.3f}" for i in largest]
    rest = 1.0 - target[largest].sum()
    if rest > 5e-4 or not lines:
        lines.append(f"others {rest:.3f}")
    return "\n".join(lines)
