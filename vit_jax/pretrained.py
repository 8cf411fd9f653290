"""Published weights as the parameters of a model at hand.

Read are Google's `.npz` files, big_vision's, timm's `.safetensors`, folders of transformers'
`ViTForImageClassification`, and runs of this code; which one it is, the contents tell. `formats.py`
has their names.
"""

import json
import logging
import math
import zipfile
from collections.abc import Sequence

import flax
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath

from vit_jax import checkpoint, formats
from vit_jax.errors import UserError
from vit_jax.formats import POSEMB
from vit_jax.models.scan import stack_blocks
from vit_jax.paths import differing_shapes

logger = logging.getLogger("vit_jax")

HEAD = ("head/kernel", "head/bias")


def load(path, model, image_size: Sequence[int] | None = None) -> dict:
    """The parameters of a published file for this model.

    The position grid is resized to that of the images; a head for another number of classes is
    left at its initial value, and said.

    Args:
        path: a `.npz` or `.safetensors` file, a folder with `config.json` and `model.safetensors`,
            a run's folder or `<run>/checkpoints/<step>`; local or gs://.
        model: the VisionTransformer they are for.
        image_size: (height, width) of its images, and their channels, where they are to be those;
            None: those of the file.

    Returns:
        float32 arrays in the tree that `model.init` makes.

    Raises:
        UserError: no such file, one that is damaged or of another kind, or parameters of another
            model; all that differ are listed.
    """
    flat, settings = read(epath.Path(path), model.num_heads)
    for name, value in settings.items():
        if getattr(model, name) != value:
            raise UserError(
                f"{path} was trained with {name} {value!r}, and the model here has "
                f"{getattr(model, name)!r}: set --config.model.{name}={value}"
            )
    height, width, *channels = image_size or size_of_images(path, flat, model)
    first_kernel = flat.get("conv_root/kernel", flat.get("embedding/kernel"))
    if not channels and first_kernel is not None:
        channels = first_kernel.shape[-2:-1]
    expected = expected_parameters(model, (height, width, *channels))
    if POSEMB in flat and POSEMB in expected:
        grid = tuple(s // t for s, t in zip((height, width), model.token_pixels, strict=True))
        flat[POSEMB] = resize_positions(flat[POSEMB], grid, model.pool == "cls")
    fit_head(path, flat, expected, model)
    check_shapes(path, flat, expected)
    flat = {name: np.asarray(value, np.float32) for name, value in flat.items()}
    params = flax.traverse_util.unflatten_dict(flat, sep="/")
    return jax.tree.map(np.asarray, stack_blocks(params)) if model.scan else params


def read(path: epath.Path, num_heads: int) -> tuple[dict[str, np.ndarray], dict]:
    """Arrays under the names of a model without scan, and fields of the model they imply."""
    if not path.exists():
        raise UserError(f"There is no {path}")
    config = {}
    if path.parent.name == "checkpoints" and path.name.isdigit():
        return read_run(path.parent.parent, int(path.name))
    if (path / "checkpoints").exists():
        return read_run(path)
    if path.is_dir():
        if not (path / "model.safetensors").exists() or not (path / "config.json").exists():
            raise UserError(f"{path} holds no config.json beside a model.safetensors")
        config, path = json.loads((path / "config.json").read_text()), path / "model.safetensors"
    with path.open("rb") as file:
        start = file.read(9)
    if start.startswith(b"PK"):
        return formats.from_flax(read_npz(path)), {}
    if start[8:] != b"{":
        raise UserError(f"{path} is neither an .npz nor a .safetensors file")
    try:
        flat = safetensors.numpy.load(path.read_bytes())
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is damaged: {error}") from None
    if any("patch_embeddings" in name for name in flat):
        epsilon = config.get("layer_norm_eps", 1e-12)
        return formats.from_hf(flat, num_heads), {"gelu": "exact", "layer_norm_eps": epsilon}
    if "patch_embed.proj.weight" in flat:
        pool = "cls" if "cls_token" in flat else "gap"
        norm = "after" if "fc_norm.weight" in flat else "before"
        settings = {"gelu": "exact", "layer_norm_eps": 1e-6, "pool": pool, "pool_norm": norm}
        return formats.from_timm(flat, num_heads), settings
    raise UserError(
        f"{path} holds no Vision Transformer of timm's or transformers'; it begins with "
        f"{', '.join(sorted(flat)[:3])}"
    )


def read_run(workdir: epath.Path, step: int | None = None) -> tuple[dict[str, np.ndarray], dict]:
    config, params = checkpoint.restore_params(workdir, step)
    flat = flax.traverse_util.flatten_dict(jax.tree.map(np.asarray, params), sep="/")
    fields = ("gelu", "layer_norm_eps", "norm", "pool", "pool_norm", "posemb")
    settings = {name: config.model[name] for name in fields if name in config.model}
    return formats.from_flax(flat), settings


def read_npz(path: epath.Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file; nothing is unpickled."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    except ValueError as error:
        raise UserError(f"{path} holds objects, not arrays, and isn't unpickled: {error}") from None


def size_of_images(path, flat, model) -> tuple[int, int]:
    """(height, width) of the square images the file's positions are for."""
    if POSEMB not in flat:
        raise UserError(f"{path} has no positions to tell its images' size from: give image_size")
    tokens = flat[POSEMB].shape[1] - (model.pool == "cls")
    return tuple(math.isqrt(tokens) * pixels for pixels in model.token_pixels)


def expected_parameters(model, image_shape) -> dict[str, tuple[int, ...]]:
    """Name -> shape, of the model without scan."""
    plain = model.clone(scan=False)
    images = jnp.zeros((1, *image_shape))
    shapes = jax.eval_shape(lambda: plain.init(jax.random.key(0), images))["params"]
    flat = flax.traverse_util.flatten_dict(shapes, sep="/")
    return {name: leaf.shape for name, leaf in flat.items()}


def resize_positions(positions, grid: tuple[int, int], has_class_token: bool) -> np.ndarray:
    """Position embeddings (1, L, D) of a square grid -> of another grid (h, w), row by row.

    Linear between the old positions with the corners aligned, as Google's code does it. The class
    token's row is kept.
    """
    first, rest = positions[:, : int(has_class_token)], positions[0, int(has_class_token) :]
    side = math.isqrt(len(rest))
    if side * side != len(rest):
        if len(rest) == grid[0] * grid[1]:
            return positions
        raise UserError(f"Its {len(rest)} positions are no square grid, and can't be resized")
    if grid == (side, side):
        return positions
    table = np.asarray(rest, np.float32).reshape(side, side, -1)
    for axis, size in enumerate(grid):
        table = interpolated(table, size, axis)
    return np.concatenate([first, table.reshape(1, grid[0] * grid[1], -1)], axis=1)


def interpolated(table, size: int, axis: int) -> np.ndarray:
    """The table at `size` places from its first to its last along an axis, linearly between."""
    places = np.linspace(0.0, table.shape[axis] - 1, size)
    low = np.minimum(places.astype(int), max(table.shape[axis] - 2, 0))
    high = np.minimum(low + 1, table.shape[axis] - 1)
    shape = [-1 if i == axis else 1 for i in range(table.ndim)]
    share = (places - low).reshape(shape).astype(np.float32)
    return table.take(low, axis) * (1 - share) + table.take(high, axis) * share


def fit_head(path, flat, expected, model) -> None:
    """Leaves out what the model lacks of the file's head; one for other classes starts anew."""
    dropped = [n for n in flat if n.startswith(("head/", "pre_logits/")) and n not in expected]
    for name in dropped:
        del flat[name]
    fits = not dropped and all(
        name in flat and flat[name].shape == expected.get(name) for name in HEAD
    )
    if HEAD[0] in expected and not fits:
        kernel, bias = HEAD
        flat[kernel] = np.zeros(expected[kernel], np.float32)
        flat[bias] = np.full(expected[bias], model.head_bias_init, np.float32)
        logger.info(f"{path}: it has no head for {model.num_classes} classes; a new one starts")


def check_shapes(path, flat, expected) -> None:
    """Raises UserError listing each parameter that is missing, extra or of another shape."""
    found = {name: value.shape for name, value in flat.items()}
    differing = [
        f"{name} {there} there, {here} here"
        for name, there, here in differing_shapes(found, expected)
    ]
    if differing:
        raise UserError(f"{path} is of another model: {'; '.join(differing)}")
