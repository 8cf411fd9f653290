"""Makes small datasets of every kind; the fixtures are in conftest.py."""

import pathlib

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image


def picture(i: int, size=(40, 30)) -> np.ndarray:
    """Returns an image that depends on i, uint8 (H, W, 3); smooth, so that JPEG preserves it.

    Args:
        i: up to 13 different images.
        size: (width, height).
    """
    x, y = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]))
    return np.uint8(255 * np.stack([x, y, np.full_like(x, (i % 13) / 13)], axis=-1))


def make_image_folder(root):
    """Writes RGB, gray and CMYK JPEGs and PNGs with transparency or a palette, of many sizes."""
    for split, count in (("train", 20), ("val", 13)):
        for i in range(count):
            folder = root / split / ("cat" if i % 2 else "dog")
            folder.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(picture(i, (30 + 3 * i, 60 - 2 * i)))
            kinds = [
                ("jpg", image),
                ("JPEG", image.convert("L")),
                ("jpg", image.convert("CMYK")),
                ("png", image.convert("RGBA")),
                ("png", image.convert("P")),
            ]
            suffix, image = kinds[i % len(kinds)]
            image.save(folder / f"{i:02d}.{suffix}")


def make_pngs(folder: pathlib.Path, count: int) -> None:
    """Writes 0.png, 1.png and so on."""
    folder.mkdir(parents=True)
    for i in range(count):
        Image.fromarray(picture(i)).save(folder / f"{i}.png")


class Pictures(tfds.core.GeneratorBasedBuilder):
    """A TFDS dataset of small images in three classes."""

    VERSION = tfds.core.Version("1.0.0")
    pkg_dir_path = pathlib.Path(__file__).parent

    def _info(self):
        names = tfds.features.ClassLabel(names=["a", "b", "c"])
        features = tfds.features.FeaturesDict({"image": tfds.features.Image(), "label": names})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, _):
        return {"train": self._generate_examples(53), "test": self._generate_examples(13)}

    def _generate_examples(self, count):
        for i in range(count):
            yield i, {"image": picture(i), "label": i % 3}


class LabelSets(tfds.core.GeneratorBasedBuilder):
    """A TFDS dataset like imagenet2012_real: example i has i % 4 of three classes."""

    VERSION = tfds.core.Version("1.0.0")
    pkg_dir_path = pathlib.Path(__file__).parent

    def _info(self):
        label = tfds.features.ClassLabel(names=["a", "b", "c"])
        features = {"image": tfds.features.Image(), "real_label": tfds.features.Sequence(label)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, _):
        return {"validation": self._generate_examples(13)}

    def _generate_examples(self, count):
        for i in range(count):
            yield i, {"image": picture(i), "real_label": [0, 1, 2][: i % 4]}


def make_tfds_folders(root) -> dict[str, str]:
    """Prepares `Pictures` as TFRecord and as ArrayRecord; returns {format: folder}."""
    return {kind: make_tfds_folder(root / kind, kind) for kind in ("tfrecord", "array_record")}


def make_tfds_folder(data_dir, file_format: str) -> str:
    """Prepares `Pictures` in five shards; returns the folder."""
    builder = Pictures(data_dir=data_dir, file_format=file_format)
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=5))
    return str(builder.data_dir)
