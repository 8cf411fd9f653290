"""Reads weights: Google's and big_vision's .npz, timm's and transformers' .safetensors, and runs.

A file's format is recognized from its contents. The codebases in `codebases/` convert names and
layouts, and read the settings that come with the weights.
"""

import dataclasses
import logging
import os
import re

import flax
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from vit_jax import models
from vit_jax.checks import check_numbers, size_pair
from vit_jax.errors import UserError, first_line
from vit_jax.paths import (
    CLS,
    EMBEDDING,
    ENCODER_NORM,
    HEAD,
    KEY,
    NORM_0,
    NORM_1,
    PATCH_HEAD,
    POSEMB,
    PRE_LOGITS,
    PRE_NORM,
    QUERY,
    REG,
    VALUE,
    block_index,
    in_block,
    is_known,
)
from vit_jax.pretrained.codebases import architecture, files, google
from vit_jax.pretrained.recognition import recognize
from vit_jax.runs import checkpoint, checkpoint_paths, run_folder
from vit_jax.storage import buckets
from vit_jax.storage.files import open_path

# Fields of a model that the shapes of its parameters determine, and fields that don't change what a
# trained model computes. The others are read from a run's configuration.
FIELDS_IN_SHAPES = (
    *("num_classes", "patch_size", "resnet", "width", "depth", "mlp_dim"),
    *("representation_size", "reg_tokens", "pre_norm", "norm_layer", "qkv_bias", "qk_norm"),
    *("init_values", "mlp_layer", "scale_mlp", "class_token"),
)
FIELDS_TO_READ = tuple(
    field for field in models.FIELDS if field not in (*FIELDS_IN_SHAPES, *models.FIELDS_OF_TRAINING)
)

logger = logging.getLogger("vit_jax")

# If nothing tells, images are normalized as by Google's code, and evaluation sees of them what it
# does by default in configs/common.py.
MEAN, STD = google.MEAN, google.STD
EVAL_CROP, EVAL_METHOD = 0.875, "bilinear"


@dataclasses.dataclass(kw_only=True)
class Weights:
    """The contents of a file, a folder or a run; None for what it doesn't tell.

    Attributes:
        path: the path as it was given.
        params: name -> array, with this code's names and unstacked blocks.
        prefix_rows: how many rows of the positions belong to the class token and the register
            tokens, if there are any: such as (1,) or (0,); if the file doesn't specify it, both,
            the usual one first.
        fields: fields of the model that the file determines besides those in the shapes.
        mean, std: how images are normalized; of pixels in [0, 1].
        image_size: (height, width).
        eval_crop: the share of the resized image's shorter side that evaluation sees; or
            "squeeze": the whole image, whose proportions aren't kept.
        eval_method: how images are resized for it, one of EVAL_METHODS in `vit_jax/checks.py`.
        class_names: in the order of the labels.
        loss: a key of LOSSES in `vit_jax/training/losses.py`.
    """

    path: str
    params: dict[str, np.ndarray]
    prefix_rows: tuple[int, ...] = (1,)
    fields: dict = dataclasses.field(default_factory=dict)
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    image_size: tuple[int, int] | None = None
    eval_crop: float | str | None = None
    eval_method: str | None = None
    class_names: tuple[str, ...] | None = None
    loss: str | None = None

    @property
    def shapes(self) -> architecture.Shapes:
        return {name: value.shape for name, value in self.params.items()}

    @property
    def model_fields(self) -> dict:
        """The fields of the model these parameters belong to."""
        fields = architecture.infer_fields(self.shapes) | self.fields
        if not fields:
            return fields
        is_needed = fields["pool"] in ("cls", "cls_gap")
        has_class_token = CLS in self.params
        fields["class_token"] = None if has_class_token == is_needed else has_class_token
        if fields["posemb"] == "learned" and CLS in self.params and self.prefix_rows == (0,):
            fields.setdefault("no_embed_class", True)
        num_registers = fields["reg_tokens"]
        if num_registers and self.prefix_rows == (num_registers + has_class_token,):
            fields.setdefault("embed_reg", fields["posemb"] == "learned")
        elif num_registers and not has_class_token and self.prefix_rows == (0,):
            fields.setdefault("no_embed_class", fields["posemb"] == "learned")
        return fields

    @property
    def channels(self) -> int:
        """How many channels the model's images have."""
        return architecture.num_channels(self.shapes)

    def check_num_heads(self, num_heads: int | None) -> None:
        """Raises UserError if a user's number of heads isn't the one that the file specifies."""
        stored = self.model_fields.get("num_heads")
        if num_heads is not None and stored not in (None, num_heads):
            raise UserError(
                f"num_heads is {num_heads}, but {self.path} has {stored} heads: leave it out"
            )

    def warn_of_assumptions(self) -> None:
        """Logs a warning if the file doesn't specify how images are normalized."""
        if self.mean is None:
            logger.warning(
                f"{self.path} doesn't specify how images are normalized: a mean and standard "
                "deviation of 0.5 are assumed"
            )


def read(path, num_heads: int | None = None) -> Weights:
    """Reads a file, a folder, a run, or `hf:owner/name`.

    Args:
        path: local or gs://; see `pretrained.load`.
        num_heads: used if the file doesn't specify it; None: the published size's.

    Raises:
        UserError: a path that doesn't exist, a damaged file, no Vision Transformer, or weights that
            aren't floating point.
    """
    if not isinstance(path, (str, os.PathLike)) or not str(path):
        raise UserError(f"The path of the weights is {path!r}; it must be a file or a folder")
    name = os.path.expanduser(path)
    try:
        local = open_path(files.fetch(name))
    except buckets.Unsupported:
        raise UserError(
            f"{name} can't be read: download it and give the file's path. Weights are read from "
            "local paths, gs:// and hf:owner/name"
        ) from None
    try:
        weights = read_any_format(name, local, num_heads)
    except UserError:
        raise
    except Exception as error:
        if "://" not in name:
            raise
        # Each kind of storage raises its own errors.
        raise UserError(f"{name} can't be read: {first_line(error)}") from None
    check_complete(weights)
    if not architecture.infer_fields(weights.shapes):
        contents = architecture.describe_contents(weights.params, {})
        raise UserError(f"{name} holds no Vision Transformer: {contents}")
    check_positions(weights)
    for parameter, value in weights.params.items():
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise UserError(
                f"{name}: {parameter} is of type {value.dtype}; weights must be floating point"
            )
    return weights


def check_complete(weights: Weights) -> None:
    """Raises UserError if a layer of a Vision Transformer has only a part of its parameters."""
    for name in weights.params:
        module, _, kind = name.rpartition("/")
        is_norm = "norm" in module.lower() or module.endswith("_ln")
        other = {"kernel": "bias", "scale": "bias"}.get(kind)
        if kind == "bias":
            other = "scale" if is_norm else "kernel"
        if other == "bias" and not has_biases(weights.params, module, is_norm):
            continue
        if other and is_layer(module) and f"{module}/{other}" not in weights.params:
            raise UserError(
                f"{weights.path} has {name} but lacks {module}/{other}: the file is incomplete"
            )


def has_biases(params, module: str, is_norm: bool) -> bool:
    """Whether layers of this kind have biases: norms, queries to values, the patch embedding."""
    if module == EMBEDDING:
        return f"{PRE_NORM}/scale" not in params or f"{EMBEDDING}/bias" in params
    if not is_norm and not module.endswith((QUERY, KEY, VALUE)):
        return True
    kinds = (NORM_0, NORM_1) if is_norm else (QUERY, KEY, VALUE)
    return any(f"{in_block(0, kind)}/bias" in params for kind in kinds)


def is_layer(module: str) -> bool:
    """Whether a layer has a kernel or scale, and a bias; convolutions of stems have no bias."""
    return (
        module in (EMBEDDING, PRE_NORM, ENCODER_NORM, PRE_LOGITS, HEAD)
        or block_index(module) is not None
    )


def check_positions(weights: Weights) -> None:
    """Raises UserError if the positions aren't a table (1, L, D) with a row for each patch."""
    if POSEMB not in weights.params:
        return
    shape = weights.params[POSEMB].shape
    if len(shape) != 3 or shape[0] != 1 or shape[1] <= min(num_prefix_rows(weights)):
        raise UserError(
            f"{weights.path}: the positions are of shape {shape}; it must be (1, length, width)"
        )


def num_prefix_rows(weights: Weights) -> tuple[int, ...]:
    """Returns how many rows the tokens before the patches may have, the likeliest first."""
    has_prefix = CLS in weights.params or REG in weights.params
    return weights.prefix_rows if has_prefix else (0,)


def read_any_format(name: str, path: epath.Path, num_heads: int | None) -> Weights:
    """Recognizes the format from the contents, and reads it."""
    if run := checkpoint_paths.parse_run_path(path):
        return read_run(name, *run)
    if not path.exists():
        is_name = re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) and not path.parent.exists()
        hint = f"; if it is on the Hugging Face Hub, give hf:{name}" if is_name else ""
        raise UserError(f"There is no {name}{hint}")
    if path.is_dir():
        return read_state_dict(name, *files.read_folder(path), num_heads)
    with path.open("rb") as file:
        start = file.read(len(files.LFS_POINTER))
    files.check_downloaded(name, start)
    if start.startswith(b"PK"):
        return Weights(path=name, **google.read(name, files.read_arrays(path)))
    if start[8:9] == b"{":
        return read_state_dict(name, files.read_safetensors(path), {}, {}, num_heads)
    pickle = path.suffix in (".bin", ".pt", ".pth")
    hint = ": PyTorch pickles are never read; save the weights as .safetensors" if pickle else ""
    raise UserError(f"{name} is neither an .npz nor a .safetensors file{hint}")


def read_state_dict(
    path: str, tensors, config: dict, processor: dict, num_heads: int | None
) -> Weights:
    """Recognizes whether tensors are timm's or transformers', and converts them.

    Args:
        path: for messages.
        tensors: the state dict.
        config, processor: config.json and preprocessor_config.json; {} if missing.
        num_heads: used if the config doesn't specify it; None: the published size's.

    Raises:
        UserError: a model that this code doesn't have, parts that it doesn't have, or an
            impossible setting.
    """
    codebase, width, config = recognize(path, tensors, config)
    contents = codebase.read(path, tensors, width, config, processor, num_heads)
    check_explained(path, contents["params"])
    return Weights(path=path, **contents)


MAX_UNKNOWN = 6  # parameters in a message


def check_explained(path: str, params) -> None:
    """Raises UserError naming the parameters that no field of the model explains."""
    unknown = [
        re.sub(r"/(kernel|scale)$", ".weight", name) for name in params if not is_known(name)
    ]
    if unknown := sorted({re.sub(r"\b\d+\b", "*", name).replace("/", ".") for name in unknown}):
        listed = ", ".join(unknown[:MAX_UNKNOWN])
        more = f" and {len(unknown) - MAX_UNKNOWN} more" if len(unknown) > MAX_UNKNOWN else ""
        raise UserError(f"{path} has parts that no field of the model explains: {listed}{more}")


def read_run(name: str, workdir: epath.Path, step: int | str | None, item: str | None) -> Weights:
    """Reads a checkpoint of a run; see `checkpoint.restore_params`.

    Of one that was trained on masked patches, the encoder and the mask token.
    """
    config, params = checkpoint.restore_params(workdir, step, item)
    if not models.predicts_classes(config):
        params = {name: params[name] for name in params if name != PATCH_HEAD}
    params = flax.traverse_util.flatten_dict(jax.tree.map(np.asarray, params), sep="/")
    model = models.from_config(config)
    for field in ("mean", "std"):
        check_numbers(f"{name}: config.augment.{field}", config.augment[field])
    return Weights(
        path=name,
        params=google.from_flax(params),
        prefix_rows=(model.num_prefix_positions,),
        fields={field: getattr(model, field) for field in FIELDS_TO_READ},
        mean=tuple(config.augment.mean),
        std=tuple(config.augment.std),
        image_size=size_pair("config.image_size", config.image_size),
        eval_crop=config.augment.eval_crop,
        eval_method=config.augment.eval_method,
        class_names=run_folder.read_class_names(workdir),
        loss=config.loss,
    )


def read_class_names(path) -> list[str]:
    """Reads a text file with the name of a class per line, in the order of the labels."""
    try:
        names = epath.Path(path).read_text().rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} can't be read as a list of class names: {error}") from None
    if not names:
        raise UserError(f"{path} is empty; it must have the name of a class per line")
    return names
