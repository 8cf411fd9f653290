"""Folders and lists of image files as sources."""

from __future__ import annotations

import hashlib
import logging
import os
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np
from etils import epath

from vit_jax.data import tf
from vit_jax.data.sources import RandomAccess, select_split
from vit_jax.errors import UserError
from vit_jax.storage import buckets
from vit_jax.storage.files import dangling_target

logger = logging.getLogger("vit_jax")

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
# Folders that other programs leave behind, with copies or previews of images. Like hidden files and
# folders, whose names start with a dot, they are ignored.
LITTER = ("__MACOSX", "@eaDir")
EVAL_SPLITS = ("val", "validation", "valid", "dev", "test")  # usual names


def open_folder(
    root: pathlib.Path, split: str, class_names: Sequence[str] | None = None
) -> RandomAccess:
    """Opens a split of a folder laid out as `<split>/<class>/*.jpg|png`; reads no image.

    Files are ordered by a hash of their paths, so that a part such as `train[:90%]` has examples
    of every class.

    Args:
        root: the folder.
        split: in TFDS's notation.
        class_names: the classes of the training split; None: the split's own, sorted by name.

    Raises:
        UserError: the split is missing or empty, a folder isn't laid out as above, or a class
            isn't among `class_names`.
    """
    whole_splits = {name: list_classes(root / name) for name in folder_splits(root, split)}
    classes = tuple(class_names or sorted(set().union(*whole_splits.values())))
    for name, images in whole_splits.items():
        if unknown := sorted(set(images) - set(classes)):
            raise UserError(
                f"{root / name} has classes that the training split, or the run, lacks: "
                f"{', '.join(unknown)}"
            )

    if missing := sorted(set(classes) - set().union(*whole_splits.values())):
        places = ", ".join(str(root / name) for name in whole_splits)
        logger.warning(
            f"{places} has no images of {len(missing)} of the {len(classes)} classes, such as "
            f"{missing[0]}"
        )

    # File names and the indices of their folders, as arrays: there may be millions of files.
    folders = [(name, label) for name, images in whole_splits.items() for label in images]
    images_of = [whole_splits[name][label] for name, label in folders]
    files = np.concatenate(images_of)
    folder_of = np.repeat(np.arange(len(folders)), [len(images) for images in images_of])
    folder_paths = [os.fsencode(f"{name}/{label}/") for name, label in folders]

    order = hash_order(folder_paths[i] + file for i, file in zip(folder_of, files, strict=True))
    split_of = np.array([name for name, _ in folders])[folder_of[order]]
    indices = {name: order[split_of == name] for name in whole_splits}
    selected, ranges = select_split(split, indices, str(root))

    fingerprint = hashlib.md5()
    for i in selected:
        fingerprint.update(folder_paths[folder_of[i]] + files[i] + b"\n")
    files, folder_of = tf.constant(files[selected]), tf.constant(folder_of[selected])
    folder_paths = tf.constant(folder_paths)
    labels = tf.constant([classes.index(label) for _, label in folders], tf.int64)

    def path(index):
        return tf.strings.join([f"{root}/", folder_paths[folder_of[index]], files[index]])

    return RandomAccess(
        name=f"{root}, split {split}",
        num_examples=len(selected),
        class_names=classes,
        describe=lambda index: os.fsdecode(path(index).numpy()),
        fetch=lambda index: (read_file(path(index), root), labels[folder_of[index]]),
        fingerprint=fingerprint.hexdigest(),
        ranges=ranges,
        exif=True,
    )


def read_file(path: tf.Tensor, root) -> tf.Tensor:
    """Returns the contents of a file below a folder, as a TensorFlow operation."""
    if not buckets.is_bucket(root):
        return tf.io.read_file(path)
    # TensorFlow's own client knows no other server than Google's, and no other credentials.
    contents = tf.numpy_function(
        lambda path: buckets.read_object(os.fsdecode(np.asarray(path).item())),
        [path],
        tf.string,
        stateful=False,
    )
    return tf.ensure_shape(contents, ())


def folder_splits(root: pathlib.Path, split: str) -> list[str]:
    """Returns the names of the whole splits in "train[:90%]+extra": train, extra.

    Raises:
        UserError: the folder lacks one of them.
    """
    folders = sorted(path.name for path in root.iterdir() if path.is_dir())
    names = [part.split("[")[0].strip() for part in split.split("+")]
    for name in names:
        if name not in folders:
            usual = [folder for folder in EVAL_SPLITS if folder in folders]
            has_other_name = name in EVAL_SPLITS and usual
            hint = f": set --config.dataset.eval_split={usual[0]}" if has_other_name else ""
            raise UserError(
                f"{root} has no split {name!r}: expected {root}/{name}/<class>/*.jpg|png, "
                f"found the folders {', '.join(folders) or 'none'}{hint}"
            )
    return names


def hash_order(paths: Iterable[bytes]) -> np.ndarray:
    """Returns the indices that sort paths by their MD5 hashes."""
    hashes = (int.from_bytes(hashlib.md5(path).digest()[:8], "big") for path in paths)
    return np.argsort(np.fromiter(hashes, np.uint64), kind="stable")


def list_classes(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns class name -> the paths, as bytes, of its images relative to the class's folder.

    Raises:
        UserError: no classes at all, or a class without images.
    """
    if buckets.is_bucket(folder):
        return list_bucket_classes(folder)
    classes, ignored = {}, []
    for name in sorted(os.listdir(folder)):
        if is_litter(name):
            ignored.append(name)
            continue
        if problem := dangling_link(folder / name):
            raise UserError(f"{folder / name} is {problem}")
        if not (folder / name).is_dir():
            continue
        images, others = list_images(folder / name)
        ignored += others
        if not images:
            raise no_images(folder / name, others)
        classes[name] = np.array([os.fsencode(file) for file in images])
    if not classes:
        raise UserError(
            f"{folder} has no class folders: expected {folder}/<class>/*.jpg|png, "
            f"found {len(list(folder.iterdir()))} files"
        )
    warn_ignored(folder, ignored)
    return classes


def no_images(folder, others: Sequence[str]) -> UserError:
    """Returns the error for a folder that has only files that aren't read, or none."""
    found = f", found {len(others)} of other kinds, such as {others[0]}" if others else ""
    return UserError(f"{folder} has no images: expected *.jpg, *.jpeg or *.png{found}")


def list_bucket_classes(folder: epath.Path) -> dict[str, np.ndarray]:
    """Returns what `list_classes` does, of a folder in a bucket, which has no links."""
    classes, ignored = {}, []
    for name in buckets.list_objects(folder):
        label, _, file = name.partition("/")
        if file and is_image(file) and not any(map(is_litter, name.split("/"))):
            classes.setdefault(label, []).append(os.fsencode(file))
        elif not file.endswith("/"):  # the empty object of a folder
            ignored.append(name)
    if not classes:
        raise UserError(f"{folder} has no images: expected {folder}/<class>/*.jpg|png")
    warn_ignored(folder, ignored)
    return {label: np.array(sorted(classes[label])) for label in sorted(classes)}


def list_images(folder: pathlib.Path) -> tuple[list[str], list[str]]:
    """Returns the paths of all images below a folder, relative to it, and of what is ignored.

    Links to folders are followed, each folder once.

    Raises:
        UserError: a folder that can't be read.
    """

    def refuse(error):
        raise UserError(f"{error.filename} can't be read: {error.strerror}")

    images, ignored, visited = [], [], set()
    for parent, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        if (real_path := os.path.realpath(parent)) in visited:
            folders.clear()
            continue
        visited.add(real_path)
        relative = os.path.relpath(parent, folder)
        prefix = "" if relative == "." else f"{relative}/"
        ignored += [prefix + name for name in folders if is_litter(name)]
        folders[:] = [name for name in folders if not is_litter(name)]  # os.walk enters these
        for name in files:
            (images if is_image(name) else ignored).append(prefix + name)
    return images, ignored


def is_image(file: str) -> bool:
    """Whether a file's name ends as an image's does, and isn't hidden."""
    return os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES and not is_litter(file)


def is_litter(name: str) -> bool:
    """Whether the name is that of a hidden file or folder, or of a folder in LITTER."""
    return name.startswith(".") or name in LITTER


def warn_ignored(folder: pathlib.Path, ignored: Sequence[str]) -> None:
    if ignored:
        logger.warning(
            f"{folder}: ignoring {len(ignored)} files or folders that are hidden or aren't *.jpg, "
            f"*.jpeg or *.png, such as {ignored[0]}"
        )


def dangling_link(path) -> str | None:
    """Returns "a dangling symbolic link to ..." if a path is one, or None."""
    target = dangling_target(path)
    return target and f"a dangling symbolic link to {target}"


def open_files(paths: Sequence[str]) -> RandomAccess:
    """Opens files, and all images below folders, as a source of unlabeled images (label -1).

    Raises:
        UserError: a file doesn't exist, or a folder has no images.
    """
    files = []
    for path in map(pathlib.Path, map(check_path, paths)):
        found = [path]
        if path.is_dir():
            images, ignored = list_images(path)
            warn_ignored(path, ignored)
            found = sorted(path / image for image in images)
            if not found:
                raise no_images(path, ignored)
        files += map(str, found)
    names = tf.constant([os.fsencode(file) for file in files])
    return RandomAccess(
        name="the given images",
        num_examples=len(files),
        class_names=(),
        describe=lambda index: files[index],
        fetch=lambda index: (tf.io.read_file(names[index]), tf.constant(-1, tf.int64)),
        exif=True,
    )


def check_path(path: str) -> str:
    """Returns a path; raises UserError if there is no such file or folder."""
    path = os.path.expanduser(path)
    if path == "-":
        raise UserError("Images can't be read from standard input (-): give a file or a folder")
    if "://" in path:
        raise UserError(f"{path} is a URL: download the image, and give the file")
    if problem := dangling_link(path):
        raise UserError(f"{path} is {problem}")
    if not os.path.exists(path):
        raise UserError(f"{path} doesn't exist")
    return path
