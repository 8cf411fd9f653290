"""A picture of what the model sees: `python input_pipeline.py --config=... --show=out.png`."""

import logging
import pathlib
from collections.abc import Iterator

import jax
import numpy as np
from absl import flags

import command_line
import input_pipeline
from vit_jax import augment, run_log, train_state
from vit_jax.errors import UserError

logger = logging.getLogger("vit_jax")

STEPS, IMAGES = 4, 8  # rows and columns


def inputs(config, source) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Images (IMAGES, H, W, C) in [0, 1] and targets (IMAGES, num_classes) of the first steps.

    Of a run with batches of IMAGES: so what is drawn once a batch is seen to change.
    """
    config = config.copy_and_resolve_references()
    config.update(batch_size=IMAGES, accum_steps=1)
    mean, std = np.array(config.augment.mean), np.array(config.augment.std)
    batches = input_pipeline.train_batches(source, config)
    for step in range(STEPS):
        batch = next(batches)
        augment_key, _ = jax.random.split(train_state.step_key(config.seed, step))
        images, targets = augment.train_inputs(
            batch["images"], batch["labels"], augment_key, source.num_classes, config.augment
        )
        yield np.clip(np.asarray(images) * std + mean, 0.0, 1.0), np.asarray(targets)


def draw(rows, class_names, floor: float, title: str, path) -> None:
    """Writes the images as a PNG: a row for each step, the soft labels under each image.

    floor: what label smoothing gives to every class.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(STEPS, IMAGES, figsize=(2 * IMAGES, 2.65 * STEPS + 0.6))
    for step, (images, targets) in enumerate(rows):
        for axis, image, target in zip(axes[step], images, targets, strict=True):
            axis.imshow(
                image.squeeze(-1) if image.shape[-1] == 1 else image, "gray", vmin=0, vmax=1
            )
            axis.set_xlabel(caption(target, class_names, floor), fontsize=9)
            axis.set(xticks=[], yticks=[])
        axes[step, 0].set_ylabel(f"step {step + 1}", fontsize=9)
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def caption(target: np.ndarray, class_names, floor: float) -> str:
    """The two largest parts of a soft label above `floor`, and what the others have."""
    largest = [i for i in np.argsort(-target, kind="stable")[:2] if target[i] > floor + 5e-4]
    lines = [f"{class_names[i][:16]} {target[i]:.3f}" for i in largest]
    rest = 1.0 - target[largest].sum()
    if rest > 5e-4 or not lines:
        lines.append(f"others {rest:.3f}")
    return "\n".join(lines)


def summary(config) -> str:
    """What of the augmentation is switched on, in one line."""
    c = config.augment
    crops = {
        "inception": f"Inception crop {c.crop_area[0]:g} to {c.crop_area[1]:g}",
        "resize": f"resized, {c.crop_keep:g} of it kept",
        "pad": f"padded by {c.pad}, cropped",
        "none": "resized",
    }
    settings = (
        (True, crops[c.crop]),
        (c.flip, "flip"),
        (any(c.color_jitter), f"colour jitter {'/'.join(f'{s:g}' for s in c.color_jitter)}"),
        (
            c.randaugment_layers,
            f"RandAugment({c.randaugment_layers}, {c.randaugment_magnitude:g})",
        ),
        (
            c.erasing_prob,
            f"erasing {c.erasing_prob:g} of {c.erasing_area[0]:g} to {c.erasing_area[1]:g}",
        ),
        (c.mixup_alpha, f"MixUp {c.mixup_alpha:g}"),
        (c.cutmix_alpha, f"CutMix {c.cutmix_alpha:g}"),
        (c.label_smoothing, f"label smoothing {c.label_smoothing:g}"),
    )
    return ", ".join(words for used, words in settings if used)


def show(config, path) -> None:
    """Draws the training split's sheet.

    Raises:
        UserError: no place to draw it, or a configuration or dataset that can't work.
    """
    run_log.start_logging()
    if path is None:
        raise UserError("--show=FILE.png is missing: where to draw what the model sees")
    path = pathlib.Path(path)
    if path.suffix != ".png" or not path.parent.is_dir():
        raise UserError(f"--show={path}: it takes a .png file in a folder that exists")
    input_pipeline.check(config)
    augment.check(config.augment)
    dataset = config.dataset
    source = input_pipeline.open_source(dataset.name, dataset.data_dir, dataset.train_split)
    title = f"{command_line.config_name()}, {source.name}\n{summary(config)}"
    floor = config.augment.label_smoothing / source.num_classes
    draw(inputs(config, source), source.class_names, floor, title, path)
    input_pipeline.report_damaged(source)
    logger.info(f"{path}: {STEPS} steps of {IMAGES} images\n{summary(config)}")


def main() -> None:
    """The command line of `python input_pipeline.py`."""
    flags.adopt_module_key_flags(command_line)
    path = flags.DEFINE_string("show", None, "The PNG to draw a contact sheet to.")
    command_line.run(lambda: show(command_line.CONFIG.value, path.value))
