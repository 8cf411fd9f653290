"""Reading weights: Google's and big_vision's `.npz`, timm's and transformers' `.safetensors`, runs.

Which one a file is, its contents tell; `formats.py` has their names, `hub.py` reads the settings
beside timm's and transformers'.
"""

import dataclasses
import zipfile
import zlib

import flax
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from vit_jax import models
from vit_jax.errors import UserError, first_line
from vit_jax.pretrained import architecture, formats, hub
from vit_jax.runs import checkpoint, run_folder

# Fields of a model that its parameters don't show.
UNSEEN = ("gelu", "layer_norm_eps", "norm", "pool", "pool_norm", "posemb", "num_heads")

# What Google's and big_vision's code computes, its normalisation of images and their crop.
FLAX_FIELDS = dict(gelu="tanh", layer_norm_eps=1e-6, pool_norm="before")
MEAN = STD = (0.5,)
KEEP = 0.875


@dataclasses.dataclass(kw_only=True)
class Weights:
    """What a file or a run holds. None: it doesn't tell.

    Attributes:
        path: as it was given.
        params: this code's names, flat, blocks one by one -> array.
        fields: of the model, as far as the file settles them beside the shapes.
        mean, std: of the normalisation of its images' pixels in [0, 1].
        image_size: (height, width).
        keep: the part of the resized image's shorter side that is seen.
        class_names: in the order of the labels.
        loss: "softmax" or "sigmoid".
    """

    path: str
    params: dict[str, np.ndarray]
    fields: dict = dataclasses.field(default_factory=dict)
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    image_size: tuple[int, int] | None = None
    keep: float | None = None
    class_names: tuple[str, ...] | None = None
    loss: str | None = None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: value.shape for name, value in self.params.items()}

    @property
    def model_fields(self) -> dict:
        """Fields of the model these are of: those seen in the shapes, and those settled."""
        return architecture.fields(self.shapes) | self.fields

    @property
    def channels(self) -> int:
        """Of its images."""
        return architecture.channels(self.shapes)


def read(path, num_heads: int | None = None) -> Weights:
    """Reads a file, a folder, a run, or `hf:owner/name`.

    Args:
        path: local or gs://; see `pretrained.load`.
        num_heads: for files that don't tell; None: those of the published size.

    Raises:
        UserError: nothing there, damaged, or of no Vision Transformer.
    """
    name = str(path)
    try:
        weights = read_any(name, epath.Path(hub.fetched(name)), num_heads)
    except UserError:
        raise
    except Exception as error:
        if "://" not in name:
            raise
        # Each kind of storage has its own.
        raise UserError(f"{name} can't be read: {first_line(error)}") from None
    if not architecture.fields(weights.shapes):
        what = hub.what_it_is(weights.params, {})
        raise UserError(f"{name} holds no Vision Transformer: {what}")
    return weights


def read_any(name: str, path: epath.Path, num_heads: int | None) -> Weights:
    if run := run_of(path):
        return read_run(name, *run)
    if not path.exists():
        raise UserError(f"There is no {name}")
    if path.is_dir():
        return Weights(path=name, **hub.converted(name, *hub.read_folder(path), num_heads))
    with path.open("rb") as file:
        start = file.read(9)
    if start.startswith(b"PK"):
        return read_npz(name, path)
    if start[8:] == b"{":
        return Weights(
            path=name, **hub.converted(name, hub.read_safetensors(path), {}, {}, num_heads)
        )
    raise UserError(f"{name} is neither an .npz nor a .safetensors file")


def run_of(path: epath.Path) -> tuple | None:
    """(workdir, step, item) that a path into a run's folder names; None: it's no such path."""
    if (path / "checkpoints").exists():
        return path, None, None
    item = None
    if path.name in ("params", "ema_params"):
        path, item = path.parent, path.name
    if path.parent.name == "checkpoints" and path.name.isdigit():
        return path.parent.parent, int(path.name), item
    return None


def read_run(name: str, workdir: epath.Path, step: int | None, item: str | None) -> Weights:
    config, params = checkpoint.restore_params(workdir, step, item)
    params = flax.traverse_util.flatten_dict(jax.tree.map(np.asarray, params), sep="/")
    model = models.from_config(config)
    size = config.image_size
    return Weights(
        path=name,
        params=formats.from_flax(params),
        fields={name: getattr(model, name) for name in UNSEEN},
        mean=tuple(config.augment.mean),
        std=tuple(config.augment.std),
        image_size=(size, size) if isinstance(size, int) else tuple(size),
        keep=config.augment.eval_crop,
        class_names=run_folder.read_class_names(workdir),
        loss=config.loss,
    )


def read_npz(name: str, path: epath.Path) -> Weights:
    """Google's and big_vision's files."""
    flat = read_arrays(path)
    if what := architecture.looks_like(flat):
        raise UserError(f"{name} holds no model of ours: it looks like {what}")
    params = formats.from_flax(flat)
    return Weights(path=name, params=params, fields=FLAX_FIELDS, mean=MEAN, std=STD)


def read_arrays(path: epath.Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file, of any precision; nothing is unpickled."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            flat = {name: arrays[name] for name in arrays.files}
    except ValueError as error:
        if "allow_pickle" not in str(error):
            raise UserError(f"{path} is damaged: {error}") from None
        raise UserError(f"{path} holds objects, not arrays, and isn't unpickled: {error}") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, KeyError, RuntimeError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    for name, value in flat.items():
        if not isinstance(value, np.ndarray):
            raise UserError(
                f"{path} is a zip file of other things than arrays, such as {name}: a PyTorch "
                "pickle isn't read; save it as .safetensors"
            )
        if value.dtype == np.dtype("V2"):  # NumPy doesn't know bfloat16, and keeps its bytes
            flat[name] = value.view(jnp.bfloat16)
    return flat


def names_in_file(path) -> list[str]:
    """The lines of a text file: names of classes, in the order of the labels."""
    try:
        return epath.Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} holds no class names: {error}") from None
