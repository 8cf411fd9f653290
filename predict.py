"""Classifies images, and draws where the model looks.

    python predict.py --workdir=runs/digits digit.png
    python predict.py --config=configs/vit_b16.py --config.init_from=B_16.npz photos/ --top=3 --json
    python predict.py --weights=hf:google/vit-base-patch16-224 photos/ --attention=attention.png

A folder means all images below it. A file that isn't an image is reported and skipped; the
exit code is then 1.
"""

if __name__ == "__main__":
    import startup  # noqa: F401

import json
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence

import numpy as np
import tqdm
from absl import flags

import command_line
import input_pipeline
from configs import common
from vit_jax import checks, models, pretrained
from vit_jax.errors import UserError
from vit_jax.figures.attention import draw_attention
from vit_jax.inference.classifier import BATCH_SIZE, Classifier
from vit_jax.logs import run_log
from vit_jax.pretrained import weights

flags.adopt_module_key_flags(command_line)
WEIGHTS = flags.DEFINE_string(
    "weights", None, "The weights to predict with, of any model: a file, a folder, hf:owner/name."
)
TOP = flags.DEFINE_integer("top", 5, "The number of classes to print per image.", lower_bound=1)
ATTENTION = flags.DEFINE_string("attention", None, "The PNG to draw attention maps to.")
CLASS_NAMES = flags.DEFINE_string(
    "class_names", None, "A text file with the name of a class per line."
)

NUM_HEADS = flags.DEFINE_integer(
    "num_heads", None, "The number of attention heads, if --weights doesn't tell it."
)
GRID = flags.DEFINE_list(
    "grid", None, "ROWS,COLUMNS of the positions, if --weights doesn't tell them."
)

MAX_DRAWN = 64  # images in a picture


def load(workdir, config, path, class_names: Sequence[str] | None = None, **settings) -> Classifier:
    """Loads a run, weights for a preset's model, or weights with the model they belong to.

    Args:
        workdir: a run's folder, or None.
        config: a preset with `init_from`, or None.
        path: weights of any model, or None.
        class_names: in the order of the labels; None: those of the weights or the dataset.
        **settings: `num_heads` and `grid` of weights, see `Classifier.load`.

    Raises:
        UserError: none or several of the three are given, or the weights can't be loaded.
    """
    if sum(map(bool, (workdir, path, config))) > 1:
        raise UserError("--workdir, --weights and --config exclude each other: give one of them")
    if workdir or path:
        return Classifier.load(workdir or path, class_names=class_names, **settings)
    if config is None or not config.init_from:
        raise UserError(
            "Nothing to predict with: give --workdir=FOLDER (a run), --weights=PATH, or "
            "--config=FILE with --config.init_from=PATH"
        )
    config = config.copy_and_resolve_references()
    input_pipeline.check(config)
    pretrained.check(config)
    stored = weights.read(config.init_from, models.from_config(config).num_heads)
    config.num_classes = config.num_classes or stored.model_fields["num_classes"]
    model, image_shape = models.from_config(config), input_pipeline.image_shape(config)
    params = pretrained.from_config(config, model, image_shape, new_head=False, weights=stored)
    return Classifier.from_weights(
        stored,
        model,
        params,
        image_shape[:2],
        class_names=class_names or stored.class_names or dataset_class_names(config),
        mean=tuple(config.augment.mean),
        std=tuple(config.augment.std),
        eval_crop=config.augment.eval_crop,
        eval_method=config.augment.eval_method,
        loss=config.loss,
    )


def dataset_class_names(config) -> tuple[str, ...] | None:
    """Returns the class names of the preset's dataset; None if it isn't on this machine."""
    dataset = config.dataset
    try:
        source = input_pipeline.open_source(dataset.name, dataset.data_dir, dataset.eval_split)
    except UserError:
        return None
    return source.class_names if len(source.class_names) == config.num_classes else None


def predictions(classifier: Classifier, source) -> Iterator[tuple]:
    """Yields (index, view, probabilities) of each image; the last is None if it isn't an image."""
    config = common.get_config()
    config.image_size = classifier.image_size
    config.dataset.update(channels=classifier.channels, on_error="skip")
    config.augment.update(eval_crop=classifier.eval_crop, eval_method=classifier.eval_method)
    batch_size, first = min(BATCH_SIZE, source.num_examples), 0
    for batch in input_pipeline.eval_batches(source, config, batch_size=batch_size):
        probabilities = classifier.probabilities(batch["images"])
        for row in range(min(batch_size, source.num_examples - first)):
            is_image = batch["mask"][row]
            yield first + row, batch["images"][row], probabilities[row] if is_image else None
        first += batch_size


def predict(classifier: Classifier, source, top: int, as_json: bool, attention: str | None) -> int:
    """Prints the classes of each image, and draws attention maps to the PNG `attention`.

    Returns:
        How many files aren't images.
    """
    num_examples = source.num_examples
    name_width = max(len(source.describe(i)) for i in range(num_examples))
    drawn, num_failed = [], 0
    no_bar = not sys.stderr.isatty() or num_examples <= BATCH_SIZE
    results = tqdm.tqdm(predictions(classifier, source), total=num_examples, disable=no_bar)
    for index, view, probabilities in results:
        name = source.describe(index)
        best = None if probabilities is None else classifier.top_classes(probabilities, top)
        if as_json:
            print(json.dumps(json_row(name, best)))
        elif best is not None:
            tqdm.tqdm.write(text_rows(f"{name:{name_width}}", best))
        if best is None:
            num_failed += 1
        elif attention and len(drawn) < MAX_DRAWN:
            drawn.append((view, f"{pathlib.Path(name).name}\n{best[0][0]} {best[0][1]:.1%}"))
    if drawn:
        views, captions = zip(*drawn, strict=True)
        views = np.stack(views)
        draw_attention(views, classifier.attention(views), captions, attention)
        left_out = num_examples - num_failed - len(drawn)
        if not as_json:
            suffix = f", {left_out} left out" if left_out else ""
            print(f"{attention}: {len(drawn)} images{suffix}")
    return num_failed


def json_row(name: str, best: list[tuple[str, float]] | None) -> dict:
    """Returns the object that --json prints for an image; `best` is None if it isn't one."""
    if best is None:
        return {"image": name, "error": "it isn't a JPEG or PNG that can be read"}
    classes = [{"class": label, "probability": probability} for label, probability in best]
    return {"image": name, "classes": classes}


def text_rows(name: str, best: list[tuple[str, float]]) -> str:
    """Returns one line per class, the first with the image's name."""
    return "\n".join(
        f"{' ' * len(name) if rank else name}  {probability:7.2%}  {label}"
        for rank, (label, probability) in enumerate(best)
    )


def parse_grid(values: list[str] | None) -> tuple[int, int] | None:
    """Returns (rows, columns) of --grid=ROWS,COLUMNS."""
    if values is None:
        return None
    if len(values) != 2 or not all(value.strip().isdecimal() for value in values):
        raise UserError(f"--grid is {','.join(values)!r}; it must be ROWS,COLUMNS, such as 14,14")
    return int(values[0]), int(values[1])


def check_not_an_input(path: str, source) -> None:
    """Raises UserError if the attention maps would overwrite one of the images."""
    if os.path.exists(path):
        for index in range(source.num_examples):
            if os.path.samefile(path, source.describe(index)):
                raise UserError(f"--attention={path} would overwrite an image: give another file")


def main(paths: list[str]):
    run_log.start_logging()
    if not paths:
        raise UserError("No images are given: add files, or folders of *.jpg, *.jpeg or *.png")
    if ATTENTION.value is not None:
        checks.check_png("--attention", ATTENTION.value)
    source = input_pipeline.open_files(paths)
    if ATTENTION.value is not None:
        check_not_an_input(ATTENTION.value, source)
    names = weights.read_class_names(CLASS_NAMES.value) if CLASS_NAMES.value else None
    config, workdir = command_line.CONFIG.value, command_line.WORKDIR.value
    settings = dict(num_heads=NUM_HEADS.value, grid=parse_grid(GRID.value))
    classifier = load(workdir, config, WEIGHTS.value, names, **settings)
    num_failed = predict(classifier, source, TOP.value, command_line.JSON.value, ATTENTION.value)
    if num_failed == source.num_examples:
        raise UserError("None of the given files is an image that can be read")
    if num_failed:
        sys.exit(1)


if __name__ == "__main__":
    command_line.run(main, needs_config=False, takes_paths=True)
