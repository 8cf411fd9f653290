"""Writes parameters as files that Google's code, timm and transformers load as they are."""

import logging
import math
from collections.abc import Sequence

import flax
import jax
import numpy as np
from etils import epath

from vit_jax.checks import (
    check_choice,
    check_class_names,
    check_eval_view,
    check_normalization,
    check_param_tree,
    size_pair,
)
from vit_jax.errors import UserError
from vit_jax.models import posemb
from vit_jax.paths import MASK_TOKEN, POSEMB, differing_shapes, unstack_blocks
from vit_jax.pretrained.codebases import google, hf, timm
from vit_jax.pretrained.codebases.architecture import param_shapes
from vit_jax.pretrained.codebases.writing import Export, num_channels, unrepresentable
from vit_jax.pretrained.loading import check_finite
from vit_jax.pretrained.weights import EVAL_CROP, EVAL_METHOD, MEAN, STD
from vit_jax.runs import run_folder
from vit_jax.storage.files import absolute_path, open_path, read_json_object

logger = logging.getLogger("vit_jax")

CODEBASES = {"google": google, "timm": timm, "hf": hf}  # format -> its package or module
FORMATS = tuple(CODEBASES)
FILE_SUFFIXES = (".npz", ".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".h5", ".msgpack")
FOLDER_FILES = ("config.json", "preprocessor_config.json", "model.safetensors")


def save(
    params,
    path,
    format: str,
    *,
    model,
    image_size: Sequence[int] | int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    eval_crop: float | str | None = None,
    eval_method: str | None = None,
    class_names: Sequence[str] | None = None,
    approximate: bool = False,
) -> None:
    """Writes parameters for another codebase; `pretrained.load` reads them back bit for bit.

    Fixed positions are written as a table, and come back as learned ones.

    Args:
        params: the model's parameters, on any devices. Beside them there may be `mask_token`, which
            transformers' DINOv2 and DINOv3 have; other formats leave it out.
        path: the file or folder to write; local or gs://. A model that is there is replaced.
        format: "google": an .npz like those under gs://vit_models. "timm": a .safetensors file,
            or a folder for `timm.create_model("local-dir:FOLDER", pretrained=True)`. "hf": a
            folder for `ViTForImageClassification.from_pretrained` (without a head: `ViTModel`).
        model: the VisionTransformer.
        image_size: an int, or (height, width); None: that of a square grid of positions.
        mean, std: how images are normalized; of pixels in [0, 1]. None: 0.5.
        eval_crop: the share of the resized image's shorter side that evaluation sees, or "squeeze";
            None: 0.875. The processor of transformers always squeezes.
        eval_method: how images are resized for it, one of EVAL_METHODS in `vit_jax/checks.py`;
            None: "bilinear". timm and transformers have "bilinear" and "bicubic"; instead of
            another one, the closest is written.
        class_names: in the order of the labels, for config.json.
        approximate: whether to write a model whose GELU, LayerNorm epsilon or normalization the
            other codebase can't represent; it then computes slightly different logits.

    Raises:
        UserError: an unknown format, a field or a parameter that the format can't represent,
            parameters of another model, or a path that can't be written or is a run's.
    """
    check_choice("format", format, FORMATS)
    check_target(path, format)
    eval_crop = EVAL_CROP if eval_crop is None else eval_crop
    eval_method = EVAL_METHOD if eval_method is None else eval_method
    check_eval_view(eval_crop, eval_method)
    check_param_tree(params)
    mean, std = tuple(mean or MEAN), tuple(std or STD)
    check_model(model, format, approximate)
    if format == "google" and not approximate:
        google.check_normalization(mean, std)
    check_class_names(class_names, model.num_classes)
    flat = flatten(params, model)
    check_finite("The parameters can't be saved", flat)
    size = resolve_image_size(flat, model, image_size)
    check_shapes(flat, model, size)
    if MASK_TOKEN in flat and not CODEBASES[format].keeps_mask_token(model):
        logger.info(f"{path}: mask_token isn't written: the format has no place for it")
        del flat[MASK_TOKEN]
    check_normalization(mean, std, num_channels(flat))
    if model.posemb != "learned" and model.rope == "none":
        num_prefix = model.num_prefix_positions
        flat[POSEMB] = posemb.table(model.posemb, *model.grid(size), model.width, num_prefix)
    export = Export(flat, model, size, mean, std, eval_crop, eval_method, class_names)
    path = open_path(path)
    try:
        CODEBASES[format].write(path, export)
    except OSError as error:
        raise UserError(f"{path} can't be written: {error.strerror or error}") from None


def check_target(path, format: str, source=None) -> None:
    """Raises UserError if writing to `path` would overwrite the source, or unrelated files."""
    target = resolve_target(path)
    is_file = CODEBASES[format].writes_file(target)
    is_named_as_file = target.suffix in FILE_SUFFIXES
    if not is_file and (is_named_as_file or (target.exists() and not target.is_dir())):
        allowed = "a folder or a .safetensors file" if format == "timm" else "a folder"
        raise UserError(f"{path} can't be written: the format {format!r} needs {allowed}")
    if source is not None:
        source = absolute_path(source)
        written = {target} if is_file else {target / name for name in FOLDER_FILES}
        if written & {source, *(source / name for name in FOLDER_FILES)}:
            raise UserError(f"{path} would overwrite the source: write to another path")
    if not is_file and run_folder.is_run(target):
        raise UserError(
            f"{path} is a run's folder, whose config.json would be overwritten: write to another "
            f"folder, such as {path}/{format}"
        )
    if not is_file and not is_replaceable(target / "config.json"):
        raise UserError(
            f"{path}/config.json would be overwritten, and isn't an exported model's: write to "
            "another folder"
        )


def exists(path) -> bool:
    """Whether a file, or a folder with a model, is at a path."""
    target = absolute_path(path)
    if not target.is_dir():
        return target.exists()
    return any((target / name).exists() for name in FOLDER_FILES)


def resolve_target(path) -> epath.Path:
    """Returns the absolute path to write to.

    Raises:
        UserError: an unknown kind of storage, or a path among a run's checkpoints.
    """
    target = absolute_path(path)
    for folder in (target, *target.parents):
        if folder.name == "checkpoints" and run_folder.has_config(folder.parent):
            raise UserError(f"{path} is among a run's checkpoints: write to another path")
    return target


def is_replaceable(path: epath.Path) -> bool:
    """Whether a config.json is missing, or that of a model of timm or transformers."""
    if not path.exists():
        return True
    try:
        return bool({"architecture", "architectures", "model_type"} & set(read_json_object(path)))
    except UserError:
        return False


def check_model(model, format: str, approximate: bool) -> None:
    """Raises UserError for a field that the format can't represent."""
    table = CODEBASES[format].representable(model, approximate)
    for field, allowed, approximable in unrepresentable(model, table, approximate):
        value, hint = getattr(model, field), ""
        if approximable:
            hint = ": approximate=True (--approximate) writes the parameters anyway"
        raise UserError(
            f"The model has {field} {value!r}; in the format {format!r} it must be "
            f"{' or '.join(map(repr, allowed))}{hint}"
        )


def flatten(params, model) -> dict[str, np.ndarray]:
    """Returns float32 arrays on the host by name, with unstacked blocks."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), jax.device_get(params))
    params = jax.tree.map(np.asarray, unstack_blocks(params)) if model.scan else params
    return flax.traverse_util.flatten_dict(params, sep="/")


def resolve_image_size(params, model, image_size) -> tuple[int, int]:
    """Returns (height, width): as given, or of a square grid of positions."""
    if image_size is not None:
        return size_pair("image_size", image_size)
    if POSEMB not in params:
        raise UserError("The parameters don't tell the size of the images: give image_size")
    num_positions = params[POSEMB].shape[1] - model.num_prefix_positions
    side = math.isqrt(num_positions)
    if side * side != num_positions:
        check_shapes(params, model, model.token_pixels, ignored=(POSEMB,))
        raise UserError(
            f"The parameters have {num_positions} positions, which are no square: give image_size"
        )
    return tuple(side * pixels for pixels in model.token_pixels)


def check_shapes(params, model, image_size, ignored: Sequence[str] = ()) -> None:
    """Raises UserError naming the first parameter, not `ignored`, that isn't the model's."""
    expected = param_shapes(model, (*image_size, num_channels(params)))
    if MASK_TOKEN in params:
        expected[MASK_TOKEN] = (1, 1, model.width)
    shapes = {name: value.shape for name, value in params.items() if name not in ignored}
    expected = {name: shape for name, shape in expected.items() if name not in ignored}
    for name, given, wanted in differing_shapes(shapes, expected):
        raise UserError(f"The parameters aren't this model's: {name} is {given}, not {wanted}")
