"""The classes of images, and what the model looks at.

python predict.py --workdir=runs/digits digit.png
python predict.py --config=configs/vit_b16.py --config.init_from=B_16.npz photos/ --top=3 --json
python predict.py --weights=hf:google/vit-base-patch16-224 photos/ --attention=attention.png

Takes files, and folders with all below them. One that is no image is reported, and the others
still run; the exit code is then 1.
"""

import json
import pathlib
import sys
from collections.abc import Iterator, Sequence

import numpy as np
import tqdm
from absl import flags

import command_line
import input_pipeline
from configs import common
from vit_jax import models, pretrained
from vit_jax.errors import UserError
from vit_jax.figures.attention import draw_attention
from vit_jax.inference.classifier import BATCH_SIZE, Classifier
from vit_jax.pretrained import weights
from vit_jax.runs import run_log

flags.adopt_module_key_flags(command_line)
WEIGHTS = flags.DEFINE_string("weights", None, "Weights by themselves; see pretrained.load.")
TOP = flags.DEFINE_integer("top", 5, "How many classes to tell, the best first.", lower_bound=1)
ATTENTION = flags.DEFINE_string("attention", None, "The PNG to draw attention rollout to.")
CLASS_NAMES = flags.DEFINE_string("class_names", None, "A text file with a class's name a line.")

DRAWN = 64  # images, at most


def load(workdir, config, path, class_names: Sequence[str] | None = None) -> Classifier:
    """The classifier of a run, of weights for a preset's model, or of weights by themselves.

    Raises:
        UserError: none of the three is given, or it can't be read or has no such classes.
    """
    if sum(map(bool, (workdir, path, config))) > 1:
        raise UserError("--workdir, --weights and --config exclude each other: give one")
    if workdir or path:
        return Classifier.load(workdir or path, class_names=class_names)
    if config is None or not config.init_from:
        raise UserError(
            "--workdir=FOLDER is missing, the run to predict with; or --weights=PATH; or "
            "--config=FILE with --config.init_from=PATH"
        )
    config = config.copy_and_resolve_references()
    input_pipeline.check(config)
    found = weights.read(config.init_from, models.from_config(config).num_heads)
    config.num_classes = config.num_classes or found.model_fields["num_classes"]
    model, shape = models.from_config(config), input_pipeline.image_shape(config)
    params = pretrained.from_config(config, model, shape, new_head=False, weights=found)
    names = class_names or found.class_names or names_of_dataset(config)
    return Classifier.of(
        found,
        model,
        params,
        shape[:2],
        names,
        mean=tuple(config.augment.mean),
        std=tuple(config.augment.std),
        keep=config.augment.eval_crop,
        loss=config.loss,
    )


def names_of_dataset(config) -> tuple[str, ...] | None:
    """The classes of the preset's dataset, where it is on this machine and has as many."""
    try:
        where = (config.dataset.name, config.dataset.data_dir, config.dataset.eval_split)
        names = input_pipeline.open_source(*where).class_names
    except UserError:
        return None
    return names if len(names) == config.num_classes else None


def predictions(classifier: Classifier, source) -> Iterator[tuple]:
    """(index, pixels, probabilities) of each image of a source; of one that is none, its index."""
    config = common.get_config()
    config.image_size = classifier.image_size
    config.dataset.update(channels=classifier.channels, on_error="skip")
    config.augment.eval_crop = classifier.keep
    batch_size, done = min(BATCH_SIZE, source.num_examples), 0
    for batch in input_pipeline.eval_batches(source, config, batch_size=batch_size):
        probabilities = classifier.probabilities(batch["images"])
        for row in range(min(batch_size, source.num_examples - done)):
            good = batch["mask"][row]
            yield (done + row, batch["images"][row], probabilities[row] if good else None)
        done += batch_size


def predict(classifier: Classifier, source, top: int, as_json: bool, attention: str | None) -> int:
    """Prints what each image is of, and draws; returns how many are no images."""
    width = max(len(source.describe(i)) for i in range(source.num_examples))
    drawn, bad = [], 0
    results = predictions(classifier, source)
    hide = not sys.stderr.isatty() or source.num_examples <= BATCH_SIZE
    for index, pixels, probabilities in tqdm.tqdm(results, total=source.num_examples, disable=hide):
        name = source.describe(index)
        if probabilities is None:
            bad += 1
            if as_json:
                print(json.dumps({"image": name, "error": "it can't be read or decoded"}))
            continue
        best = classifier.best(probabilities, top)
        if as_json:
            classes = [{"class": label, "probability": share} for label, share in best]
            print(json.dumps({"image": name, "classes": classes}))
        else:
            for rank, (label, share) in enumerate(best):
                tqdm.tqdm.write(f"{'' if rank else name:{width}}  {share:7.2%}  {label}")
        if attention and len(drawn) < DRAWN:
            drawn.append((pixels, f"{pathlib.Path(name).name}\n{best[0][0]} {best[0][1]:.1%}"))
    if attention and drawn:
        images, captions = zip(*drawn, strict=True)
        images = np.stack(images)
        draw_attention(images, classifier.attention(images), captions, attention)
        left_out = source.num_examples - bad - len(drawn)
        if not as_json:
            left_out = f", {left_out} left out" if left_out else ""
            print(f"{attention}: {len(drawn)} images{left_out}")
    return bad


def main(paths: list[str]):
    run_log.start_logging()
    if not paths:
        raise UserError("No image is named: give files, or folders of *.jpg, *.jpeg or *.png")
    check_png(ATTENTION.value)
    source = input_pipeline.open_files(paths)
    names = weights.names_in_file(CLASS_NAMES.value) if CLASS_NAMES.value else None
    config, workdir = command_line.CONFIG.value, command_line.WORKDIR.value
    classifier = load(workdir, config, WEIGHTS.value, names)
    if bad := predict(classifier, source, TOP.value, command_line.JSON.value, ATTENTION.value):
        if bad == source.num_examples:
            raise UserError("None of the files given is an image that can be read")
        sys.exit(1)


def check_png(path: str | None) -> None:
    if path and (not path.endswith(".png") or not pathlib.Path(path).parent.is_dir()):
        raise UserError(f"--attention={path}: it takes a .png file in a folder that exists")


if __name__ == "__main__":
    command_line.run(main, needs_config=False, takes_paths=True)
