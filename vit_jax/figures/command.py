"""Draws every figure of a run or of published weights."""

import argparse
import functools
import logging
import pathlib
import sys
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from etils import epath

from vit_jax.checks import check_png
from vit_jax.errors import UserError
from vit_jax.figures import attention, components, curves, embeddings, masked
from vit_jax.figures.drawing import save
from vit_jax.inference.classifier import ATTENTION_BATCH_SIZE, Classifier
from vit_jax.inference.features import check_layers, features, quarter_layers
from vit_jax.inference.images import pillow_pixels, view_box
from vit_jax.models import predicts_classes
from vit_jax.objectives import masked_patches
from vit_jax.paths import MASK_TOKEN, PATCH_HEAD
from vit_jax.runs import checkpoint, checkpoint_paths, run_folder
from vit_jax.storage.mirror import check_out, written_folder
from vit_jax.weight_flags import add_weight_flags

logger = logging.getLogger("vit_jax")

MAX_IMAGES = 12  # in a picture
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


class AnyModel(Classifier):
    """A model with its parameters and preprocessing; it needs no head."""

    def check_classes(self) -> None:
        """Accepts every model."""

    @property
    def classifies(self) -> bool:
        return bool(self.model.num_classes) and self.model.pool != "none"


class Images:
    """The images to draw, and what the model sees of them.

    Attributes:
        pixels: uint8 (H, W, channels), each of its own size.
        captions: a string for each.
        boxes: the part of each that the model sees, see `view_box`.
    """

    def __init__(self, subject: AnyModel, images: Sequence[tuple[str, np.ndarray]]):
        names, self.pixels = zip(*images, strict=True)
        self.boxes = [
            view_box(image.shape[:2], subject.image_size, subject.eval_crop)
            for image in self.pixels
        ]
        self.captions = list(map(short, names))
        if subject.classifies:
            best = (best[0] for best in subject(list(self.pixels), top=1))
            self.captions = [
                f"{short(name)}\npredicted: {short(label)}, {probability:.1%}"
                for name, (label, probability) in zip(names, best, strict=True)
            ]


def short(text: str, length: int = 16) -> str:
    """Returns a text, or its beginning and an ellipsis."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def draw_all(
    path: str,
    out,
    images: Sequence[str] = (),
    compare: Sequence[str] = (),
    layers: Sequence[int] | None = None,
    metrics: Sequence[str] = (),
    **settings,
):
    """Draws every figure of a run or of weights, and yields a line about each.

    Args:
        path: a run's folder, or what `pretrained.load` takes.
        out: the folder to write PNGs to.
        images: files, or folders for all images below them; empty: the embedded digits for a run
            on them, otherwise the two photographs of scikit-learn.
        compare: folders of further runs, whose curves are drawn beside this run's.
        layers: the blocks whose features are drawn; None: at the quarters of the depth.
        metrics: which curves are drawn; empty: all.
        **settings: `image_size`, `num_heads` and `grid`, see `Classifier.load`.

    Raises:
        UserError: the model or an image can't be read, `out` can't be written, or a figure would
            replace a file that isn't one.
    """
    check_out(out)
    subject = AnyModel.load(path, **settings)
    run = checkpoint_paths.parse_run_path(path)
    workdir = run and run.workdir
    if compare and workdir is None:
        raise UserError(f"--compare draws the curves of runs, but {path} is not a run's folder")
    layers = tuple(layers or quarter_layers(subject.model.depth))
    check_layers(layers, subject.model.depth)
    drawn = Images(subject, read_images(images, workdir, subject.channels))
    figures = dict(model_figures(subject, drawn, layers))
    if run is not None and not predicts_classes(run_folder.require_config(workdir)):
        figures["masked"] = lambda: masked_figure(subject, run, drawn)
    for other in compare:
        curves.series(other)  # raises if it isn't a run's folder
    if workdir is not None:
        figures["curves"] = lambda: curves.curves([workdir, *compare], metrics=metrics)
    with written_folder(out) as folder:
        for name in figures:
            check_png("--out", str(folder / f"{name}.png"))
        for name, draw in figures.items():
            try:
                save(draw(), folder / f"{name}.png")
                yield f"{epath.Path(out) / f'{name}.png'}: {DESCRIPTIONS[name]}"
            except UserError as error:
                yield f"{name} not drawn: {error}"


DESCRIPTIONS = {
    "rollout": "how much each part of the images contributes, by attention rollout",
    "heads": "attention by block and head",
    "distances": "mean attention distance by block and head",
    "filters": "principal components of the filters that see the pixels",
    "positions": "similarity of the position embeddings",
    "features": "features of some blocks as colors",
    "masked": "patches that the model predicts from the rest of the images",
    "curves": "metrics of the run, and of those it is compared with",
}


def model_figures(subject: AnyModel, drawn: Images, layers: Sequence[int]):
    """Yields (name, function that returns the figure) of each figure but the curves."""
    model, params, pixels = subject.model, subject.params, list(drawn.pixels)

    def compute(function, images=pixels):
        """Applies a function of (model, params, normalized images) to images, in batches."""
        compiled = subject.of_views(functools.partial(function, model))
        return subject.map_batches(compiled, images, ATTENTION_BATCH_SIZE)

    def rollout():
        title = "Attention rollout: how much each part of an image contributes to the output"
        maps = subject.attention(pixels)
        return attention.rollout(pixels, maps, drawn.captions, drawn.boxes, title)

    def heads():
        source = "from the class token" if model.has_class_token else "that patches get, on average"
        view = subject.views(pixels[:1])[0]
        maps = compute(attention.head_maps, pixels[:1])[0]
        title = f"Attention {source}, by block and head"
        return attention.heads(view, maps, model.token_pixels, title)

    def distances():
        values = compute(attention.attention_distances).mean(axis=0)
        uniform = attention.patch_distances(model.grid(subject.image_size), model.token_pixels)
        height, width = subject.image_size
        title = f"Mean attention distance, over {count(pixels, 'image')} of {height}x{width} pixels"
        return attention.distances(values, uniform.mean(), title)

    def feature_maps():
        def stacked(model, params, images):  # -> (N, layers, rows, columns, D)
            return jnp.stack(features(model, params, images, layers), axis=1)

        maps = compute(stacked).swapaxes(0, 1)
        title = (
            "Features of blocks: the first three principal components as red, green and blue, with "
            "their share of the variance"
        )
        return components.feature_maps(pixels, maps, layers, drawn.captions, drawn.boxes, title)

    yield "rollout", rollout
    yield "heads", heads
    yield "distances", distances
    yield "filters", lambda: embeddings.filters(model, params)
    yield "positions", lambda: embeddings.positions(model, params, subject.image_size)
    yield "features", feature_maps


def masked_figure(subject: AnyModel, run, drawn: Images):
    """Returns the figure of a run that was trained on masked patches.

    Args:
        subject: its encoder.
        run: its folder, step and item, as `checkpoint_paths.parse_run_path` returns them.
        drawn: the images.
    """
    config, params = checkpoint.restore_params(*run)
    module = masked_patches.create(subject.model, config)
    params = {**subject.params, **{name: params[name] for name in (MASK_TOKEN, PATCH_HEAD)}}
    views = subject.views(list(drawn.pixels))
    panels = masked.panels(module, params, views, subject.mean, subject.std)
    title = "Masked patches: what is left of each image, and what the model predicts"
    return masked.predictions(panels, drawn.captions, title)


def count(things: Sequence, noun: str) -> str:
    """Returns a number of things, such as "1 image" or "2 images"."""
    return f"{len(things)} {noun}{'' if len(things) == 1 else 's'}"


def read_images(paths: Sequence[str], run, channels: int) -> list[tuple[str, np.ndarray]]:
    """Returns the images to draw as (name, uint8 (H, W, channels)).

    Args:
        paths: files and folders; empty: images that fit the run, see `draw_all`.
        run: the run's folder; None: the model isn't a run's.
        channels: 1 or 3.
    """
    from PIL import Image

    if not paths:
        opened = default_images(run)
    else:
        files = list_files(paths)
        if len(files) > MAX_IMAGES:
            logger.warning(f"Of {len(files)} images, the first {MAX_IMAGES} are drawn")
        opened = [(file.name, open_image(file)) for file in files[:MAX_IMAGES]]
    images = []
    for name, image in opened:
        image = image if paths else Image.fromarray(image)
        try:
            images.append((name, np.atleast_3d(pillow_pixels(image, channels))))
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
    return images


def list_files(paths: Sequence[str]) -> list[pathlib.Path]:
    """Returns files, and all images below folders."""
    files = []
    for path in map(pathlib.Path, paths):
        found = [path]
        if path.is_dir():
            found = sorted(f for f in path.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES)
            if not found:
                raise UserError(f"{path} has no images: expected *.jpg, *.jpeg or *.png")
        files += found
    return files


def open_image(file: pathlib.Path):
    """Opens a file as a PIL image."""
    from PIL import Image

    try:
        return Image.open(file)
    except FileNotFoundError:
        raise UserError(f"There is no {file}") from None
    except (OSError, Image.DecompressionBombError) as error:
        raise UserError(f"{file} can't be read as an image: {error}") from None


def default_images(run) -> list[tuple[str, np.ndarray]]:
    """Returns a digit of each class for a run on the embedded digits, or two photographs."""
    try:
        from sklearn import datasets
    except ImportError:
        raise UserError(
            "The default images need scikit-learn: install it, or give --images"
        ) from None
    config = run_folder.read_config(run) if run is not None else None
    if config is None or config.dataset.name != "digits":
        photographs = datasets.load_sample_images()
        names = (pathlib.Path(name).name for name in photographs.filenames)
        return list(zip(names, photographs.images, strict=True))
    digits = datasets.load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    chosen = [np.flatnonzero(digits.target == digit)[4] for digit in range(10)]  # not trained on
    return [(f"digit {digits.target[i]}", pixels[i]) for i in chosen]


def parse_flags(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m vit_jax.figures",
        description="Draws what a model attends to, what it learned, and its training.",
    )
    parser.add_argument("run", help="a run's folder, or weights: a file, a folder, hf:owner/name")
    parser.add_argument("--out", required=True, help="the folder to write PNG files to")
    parser.add_argument(
        "--images",
        nargs="+",
        action="extend",
        default=[],
        help="files, or folders for all images below them (default: digits, or two photographs)",
    )
    parser.add_argument(
        "--compare",
        nargs="+",
        action="extend",
        default=[],
        metavar="RUN",
        help="folders of further runs, to draw their curves beside this run's",
    )
    parser.add_argument(
        "--metrics",
        nargs="+",
        action="extend",
        default=[],
        metavar="METRIC",
        help="which curves are drawn, such as loss learning_rate (default: all)",
    )
    parser.add_argument(
        "--layers",
        nargs="+",
        type=int,
        help="the blocks whose features are drawn, from 1 (default: at the quarters of the depth)",
    )
    add_weight_flags(parser)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    args = vars(parse_flags(arguments))
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        path = checkpoint_paths.at_step(args.pop("run"), args.pop("step"))
        for line in draw_all(path, args.pop("out"), **args):
            print(line, flush=True)
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    except MemoryError as error:
        print(f"Not enough memory: {error or 'use a smaller --image_size'}", file=sys.stderr)
        return 2
    return 0
