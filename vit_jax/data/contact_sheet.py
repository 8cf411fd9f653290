"""Draws training batches as a contact sheet: the images and labels that model and loss get."""

from collections.abc import Iterable, Sequence

import numpy as np

from vit_jax.checks import PNG_METADATA


def draw(
    batches: Iterable[tuple[np.ndarray, np.ndarray]],
    class_names: Sequence[str] | None,
    title: str,
    path,
    label_smoothing: float = 0.0,
) -> None:
    """Writes a PNG with a row for each batch, and the soft label under each image.

    Args:
        batches: images (N, H, W, C) in [0, 1], and targets (N, num_classes).
        class_names: the names of the classes, in the order of the targets; None: no label is shown.
        title: the text above the images.
        path: the PNG file.
        label_smoothing: the probability spread over all classes. Captions leave out classes that
            have no more than their part of it.
    """
    from matplotlib.figure import Figure

    batches = list(batches)
    num_images = len(batches[0][0])
    figure = Figure(figsize=(2 * num_images, 2.65 * len(batches) + 0.6))
    axes = figure.subplots(len(batches), num_images, squeeze=False)
    for row, (images, targets) in enumerate(batches):
        for axis, image, target in zip(axes[row], images, targets, strict=True):
            image = image.squeeze(-1) if image.shape[-1] == 1 else image
            axis.imshow(image, "gray", vmin=0, vmax=1)
            if class_names:
                share = label_smoothing / len(class_names)
                axis.set_xlabel(caption(target, class_names, share), fontsize=9)
            axis.set(xticks=[], yticks=[])
        axes[row, 0].set_ylabel(f"step {row + 1}", fontsize=9)
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=80, metadata=PNG_METADATA)


def caption(target: np.ndarray, class_names: Sequence[str], smoothing_share: float) -> str:
    """Returns the two most probable classes, and the total probability of the others.

    Args:
        target: probabilities (num_classes,).
        class_names: the names of the classes.
        smoothing_share: classes that have no more than this aren't named.
    """
    most_probable = np.argsort(-target, kind="stable")[:2]
    named = [i for i in most_probable if target[i] > smoothing_share + 5e-4]
    lines = [f"{class_names[i][:16]} {target[i]:.3f}" for i in named]
    others = 1.0 - target[named].sum()
    if others > 5e-4 or not lines:
        lines.append(f"others {others:.3f}")
    return "\n".join(lines)
