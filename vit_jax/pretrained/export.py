"""Writes parameters as files that Google's code, timm and transformers load as they are."""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence

import flax
import jax
import numpy as np
import safetensors.numpy
from etils import epath

from vit_jax.checks import (
    SQUEEZE,
    check_choice,
    check_class_names,
    check_eval_view,
    check_normalization,
    size_pair,
)
from vit_jax.errors import UserError
from vit_jax.models import FIELDS_OF_TRAINING, VisionTransformer, posemb
from vit_jax.paths import POSEMB, differing_shapes, unstack_blocks
from vit_jax.pretrained import architecture, formats, hub
from vit_jax.pretrained.loading import check_finite
from vit_jax.pretrained.weights import EVAL_CROP, EVAL_METHOD, MEAN, STD
from vit_jax.runs import run_folder
from vit_jax.storage.files import (
    absolute_path,
    atomic_path,
    open_path,
    read_json_object,
    write_atomically,
)

FORMATS = ("google", "timm", "hf")
FILE_SUFFIXES = (".npz", ".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".h5", ".msgpack")
FOLDER_FILES = ("config.json", "preprocessor_config.json", "model.safetensors")

# Which models each format can represent. Fields in ANY_VALUE don't matter to any format: sizes,
# positions (written as a table), and what only concerns training or speed. For the other
# fields, the table has the allowed values; a field that isn't in it must have its default.
ANY_VALUE = (
    *("num_classes", "patch_size", "width", "depth", "num_heads", "mlp_dim", "posemb"),
    *FIELDS_OF_TRAINING,
    *("parent", "name"),  # Flax's own
)
ANY = "any value"
REPRESENTABLE = {
    "google": dict(
        gelu=("tanh",),
        layer_norm_eps=(1e-6,),
        pool=("cls", "gap", "none"),
        pool_norm=("before",),
        norm=("pre",),
        representation_size=ANY,
        resnet=ANY,
    ),
    "timm": dict(
        gelu=("tanh", "exact", "quick"),
        layer_norm_eps=(1e-6, 1e-5),
        pool=("cls", "gap", "map"),
        pool_norm=("before", "after"),
        class_token=ANY,
        reg_tokens=ANY,
        no_embed_class=ANY,
        embed_reg=ANY,
        pre_norm=ANY,
        norm=("pre",),
        qkv_bias=ANY,
        qk_norm=ANY,
        init_values=ANY,
        mlp_layer=ANY,
        scale_mlp=ANY,
        representation_size=(None,),
        resnet=(None,),
    ),
    "hf": dict(
        gelu=("tanh", "exact"),
        layer_norm_eps=ANY,
        pool=("cls",),
        pool_norm=("before",),
        class_token=(None, True),
        norm=("pre",),
        representation_size=(None,),
        resnet=(None,),
    ),
}
HF_ACTIVATIONS = {"tanh": "gelu_pytorch_tanh", "exact": "gelu", "quick": "quick_gelu"}
# What other models of transformers have, by model_type: a model is written as the first that has
# all of its fields, or else as a ViT.
HF_OTHERS = {
    "dinov2": dict(pool=("cls", "cls_gap"), init_values=ANY, mlp_layer=ANY),
    "dinov2_with_registers": dict(
        pool=("cls", "cls_gap"), init_values=ANY, mlp_layer=ANY, reg_tokens=ANY
    ),
    "deit": dict(reg_tokens=(1,), embed_reg=(True,)),
    "clip_vision_model": dict(
        gelu=ANY, pool_norm=("after",), pre_norm=(True,), num_classes=(None,)
    ),
    "siglip_vision_model": dict(
        gelu=ANY, pool=("map",), class_token=(None, False), num_classes=(None,)
    ),
    "ijepa": dict(pool=("gap", "none"), class_token=(None, False)),
    "dinov3_vit": dict(
        num_classes=(None,),
        init_values=ANY,
        mlp_layer=ANY,
        reg_tokens=ANY,
        posemb=("none",),
        rope=("axial",),
        rope_temperature=ANY,
        rope_grid=("centered",),
    ),
}
HF_CLASSES = {  # model_type -> its class, and its class with a head
    "vit": ("ViTModel", "ViTForImageClassification"),
    "deit": ("DeiTModel", "DeiTForImageClassification"),
    "dinov2": ("Dinov2Model", "Dinov2ForImageClassification"),
    "dinov2_with_registers": (
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersForImageClassification",
    ),
    "clip_vision_model": ("CLIPVisionModel", None),
    "siglip_vision_model": ("SiglipVisionModel", None),
    "ijepa": ("IJepaModel", "IJepaForImageClassification"),
    "dinov3_vit": ("DINOv3ViTModel", None),
}
# Fields that may have these other values if `approximate` is set.
APPROXIMABLE = {"gelu": ("tanh", "exact"), "layer_norm_eps": ANY}


@dataclasses.dataclass(frozen=True)
class Export:
    """Parameters ready to be written, with what the JSON files beside them tell.

    Attributes:
        params: name -> float32 array, with unstacked blocks and a table of positions.
        model: the VisionTransformer.
        image_size: (height, width).
        mean, std: how images are normalized; of pixels in [0, 1].
        eval_crop, eval_method: what evaluation sees of images, see `Weights`.
        class_names: in the order of the labels, or None.
    """

    params: dict[str, np.ndarray]
    model: VisionTransformer
    image_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    eval_crop: float | str
    eval_method: str
    class_names: Sequence[str] | None

    @property
    def channels(self) -> int:
        return num_channels(self.params)

    @property
    def interpolation(self) -> str:
        """The method of timm and transformers that is closest to `eval_method`."""
        kernel = self.eval_method.partition("_")[0]
        return kernel if kernel in hub.RESAMPLE_CODES else "bilinear"


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
        params: the model's parameters, on any devices.
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
    if not isinstance(params, Mapping) or "params" in params:
        raise UserError("params must be the tree of parameters: variables['params']")
    mean, std = tuple(mean or MEAN), tuple(std or STD)
    check_model(model, format, approximate)
    if format == "google" and not approximate:
        check_google_normalization(mean, std)
    check_class_names(class_names, model.num_classes)
    flat = flatten(params, model)
    check_finite("The parameters can't be saved", flat)
    size = resolve_image_size(flat, model, image_size)
    check_shapes(flat, model, size)
    check_normalization(mean, std, num_channels(flat))
    if model.posemb != "learned" and model.rope == "none":
        num_prefix = model.num_prefix_positions
        flat[POSEMB] = posemb.table(model.posemb, *model.grid(size), model.width, num_prefix)
    export = Export(flat, model, size, mean, std, eval_crop, eval_method, class_names)
    path = open_path(path)
    try:
        {"google": write_google, "timm": write_timm, "hf": write_hf}[format](path, export)
    except OSError as error:
        raise UserError(f"{path} can't be written: {error.strerror or error}") from None


def check_target(path, format: str, source=None) -> None:
    """Raises UserError if writing to `path` would overwrite the source, or unrelated files."""
    target = resolve_target(path)
    is_file = format == "google" or (format == "timm" and target.suffix == ".safetensors")
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
    table = REPRESENTABLE[format]
    if format == "hf":
        model_type = hf_model_type(model, approximate)
        table = table | HF_OTHERS.get(model_type, {})
        if model_type.startswith("dinov2"):
            dinov2_mlp_ratio(model)
    if format == "timm" and model.mlp_layer == "swiglu":
        check_timm_swiglu(model, approximate)
    for field, allowed, approximable in unrepresentable(model, table, approximate):
        value, hint = getattr(model, field), ""
        if approximable:
            hint = ": approximate=True (--approximate) writes the parameters anyway"
        raise UserError(
            f"The model has {field} {value!r}; in the format {format!r} it must be "
            f"{' or '.join(map(repr, allowed))}{hint}"
        )


def check_timm_swiglu(model, approximate: bool) -> None:
    """Raises UserError for what timm's architecture with a SwiGLU can't have beside it."""
    if model.pool == "map":
        raise UserError(
            "The model has mlp_layer 'swiglu' and pool 'map', whose activation differs; in the "
            "format 'timm' it must be the same"
        )
    if model.layer_norm_eps == 1e-5 and not approximate:  # no argument of timm's sets it
        raise UserError(
            "The model has mlp_layer 'swiglu' and layer_norm_eps 1e-05; with 'swiglu', in the "
            "format 'timm' it must be 1e-06: approximate=True (--approximate) writes the "
            "parameters anyway"
        )


def unrepresentable(model, table: dict, approximate: bool) -> Iterator[tuple]:
    """Yields each field that a table of REPRESENTABLE doesn't allow.

    Returns:
        The name, the allowed values, and whether `approximate` would allow its value.
    """
    for field in dataclasses.fields(model):
        if field.name in ANY_VALUE and field.name not in table:
            continue
        value = getattr(model, field.name)
        allowed = table.get(field.name, (field.default,))
        approximable = APPROXIMABLE.get(field.name, ())
        approximable = approximable == ANY or value in approximable
        if allowed != ANY and value not in allowed and not (approximate and approximable):
            yield field.name, allowed, approximable


def hf_model_type(model, approximate: bool = False) -> str:
    """Returns the model_type of transformers that has all fields of a model; else "vit"."""
    is_vit = not any(unrepresentable(model, REPRESENTABLE["hf"], approximate))
    for model_type, fields in HF_OTHERS.items():
        if is_vit:
            break
        if model_type.startswith("dino") and model.init_values is None:
            continue
        has_head = bool(model.num_classes)
        if model_type.startswith("dinov2") and has_head != (model.pool == "cls_gap"):
            continue
        if model_type == "ijepa" and has_head != (model.pool == "gap"):
            continue
        if not any(unrepresentable(model, REPRESENTABLE["hf"] | fields, approximate)):
            return model_type
    return "vit"


def check_google_normalization(mean, std) -> None:
    """Raises UserError for another normalization than that of Google's code."""
    if set(mean + std) != {0.5}:
        raise UserError(
            f"Google's code normalizes images with mean and std 0.5, but these are {mean} and "
            f"{std}: approximate=True (--approximate) writes the parameters anyway"
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
        raise UserError(
            f"The parameters have {num_positions} positions, which are no square: give image_size"
        )
    return tuple(side * pixels for pixels in model.token_pixels)


def check_shapes(params, model, image_size) -> None:
    """Raises UserError naming the first parameter that isn't the model's."""
    expected = architecture.param_shapes(model, (*image_size, num_channels(params)))
    shapes = {name: value.shape for name, value in params.items()}
    for name, given, wanted in differing_shapes(shapes, expected):
        raise UserError(f"The parameters aren't this model's: {name} is {given}, not {wanted}")


def num_channels(params) -> int:
    return architecture.num_channels({name: value.shape for name, value in params.items()})


def write_google(path: epath.Path, export: Export) -> None:
    """Writes an .npz file."""
    if path.suffix != ".npz":
        raise UserError(f"{path}: a file in the format 'google' must have a name ending in .npz")
    arrays = formats.to_google(export.params)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as unfinished, unfinished.open("wb") as file:
        np.savez(file, **arrays)


def write_timm(path: epath.Path, export: Export) -> None:
    """Writes a .safetensors file, or a folder with one and config.json."""
    tensors = formats.to_timm(export.params, export.model)
    if path.suffix == ".safetensors":
        write_files(path.parent, {path.name: tensors})
    else:
        write_files(path, {"config.json": timm_config(export), "model.safetensors": tensors})
        (path / "preprocessor_config.json").unlink(missing_ok=True)  # of a model that was there


def write_hf(path: epath.Path, export: Export) -> None:
    """Writes a folder with model.safetensors and the settings of model and processor."""
    model_type = hf_model_type(export.model, approximate=True)
    tensors = formats.to_hf(export.params, model_type)
    if model_type == "dinov2_with_registers":  # which always has a token for masked patches
        prefix = f"{model_type}." if export.model.num_classes else ""
        tensors[f"{prefix}embeddings.mask_token"] = np.zeros((1, export.model.width), np.float32)
    files = {
        "config.json": hf_config(export, model_type),
        "preprocessor_config.json": hf_processor(export),
        "model.safetensors": tensors,
    }
    write_files(path, files)


def write_files(folder: epath.Path, files: dict) -> None:
    """Writes {name: JSON object, or tensors} to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if name.endswith(".json"):
            content = json.dumps(content, indent=2) + "\n"
        else:
            tensors = {key: np.ascontiguousarray(value) for key, value in content.items()}
            content = safetensors.numpy.save(tensors, metadata={"format": "pt"})
        write_atomically(folder / name, content)


def timm_config(export: Export) -> dict:
    """Returns timm's config.json; its arguments turn timm's B/16 into this model."""
    model, channels = export.model, export.channels
    activations = {"tanh": "gelu_tanh", "exact": "gelu", "quick": "quick_gelu"}
    architecture, activation = "vit_base_patch16_224", activations[model.gelu]
    if model.layer_norm_eps == 1e-5:
        architecture = "vit_base_patch16_clip_224"
    if model.mlp_layer == "swiglu":
        architecture, activation = "vit_giant_patch14_dinov2", "silu"
    pool = {"cls": "token", "gap": "avg", "map": "map"}[model.pool]
    arguments = {
        "img_size": list(export.image_size),
        "patch_size": list(model.patch_shape),
        "in_chans": channels,
        "embed_dim": model.width,
        "depth": model.depth,
        "num_heads": model.num_heads,
        "mlp_ratio": mlp_ratio(model),
        "global_pool": pool,
        "class_token": model.has_class_token,
        "fc_norm": model.pool_norm == "after",
        "no_embed_class": model.no_embed_class,
        "act_layer": activation,
    }
    arguments |= {  # of models that have these parts
        argument: value
        for argument, value, default in (
            ("reg_tokens", model.reg_tokens, 0),
            ("pre_norm", model.pre_norm, architecture == "vit_base_patch16_clip_224"),
            ("qkv_bias", model.qkv_bias, True),
            ("qk_norm", model.qk_norm, False),
            ("scale_mlp_norm", model.scale_mlp, False),
            ("init_values", model.init_values, 1e-5 if model.mlp_layer == "swiglu" else None),
        )
        if value != default
    }
    config = {
        "architecture": architecture,
        "num_classes": model.num_classes or 0,
        "num_features": model.width,
        "global_pool": pool,
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [channels, *export.image_size],
            "fixed_input_size": True,
            "interpolation": export.interpolation,
            "crop_pct": 1.0 if export.eval_crop == SQUEEZE else export.eval_crop,
            "crop_mode": "squash" if export.eval_crop == SQUEEZE else "center",
            "mean": per_channel(export.mean, channels),
            "std": per_channel(export.std, channels),
            "num_classes": model.num_classes or 0,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    return config | ({"label_names": list(export.class_names)} if export.class_names else {})


def mlp_ratio(model) -> float:
    """Returns a ratio whose product with the width timm rounds down to mlp_dim."""
    mlp_dim = model.mlp_dim or 4 * model.width
    if model.mlp_layer == "swiglu":  # gate and values
        mlp_dim *= 2
    ratio = mlp_dim / model.width
    return ratio if int(model.width * ratio) == mlp_dim else math.nextafter(ratio, math.inf)


def hf_config(export: Export, model_type: str) -> dict:
    """Returns the config.json of transformers."""
    model = export.model
    config = {
        "architectures": [HF_CLASSES[model_type][bool(model.num_classes)]],
        "model_type": model_type,
        "hidden_size": model.width,
        "num_hidden_layers": model.depth,
        "num_attention_heads": model.num_heads,
        "intermediate_size": model.mlp_dim or 4 * model.width,
        "hidden_act": HF_ACTIVATIONS[model.gelu],
        "layer_norm_eps": model.layer_norm_eps,
        "image_size": one_or_pair(export.image_size),
        "patch_size": one_or_pair(model.patch_shape),
        "num_channels": export.channels,
        "qkv_bias": True,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    if model_type.startswith("dinov2"):
        del config["intermediate_size"]
        config |= {
            "mlp_ratio": dinov2_mlp_ratio(model),
            "use_swiglu_ffn": model.mlp_layer == "swiglu",
            "layerscale_value": model.init_values,
            "use_mask_token": model_type != "dinov2",
        }
    if model_type in ("dinov2_with_registers", "dinov3_vit"):
        config["num_register_tokens"] = model.reg_tokens
    if model_type == "dinov3_vit":
        is_gated = model.mlp_layer == "swiglu"
        config |= {
            "use_gated_mlp": is_gated,
            "hidden_act": "silu" if is_gated else config["hidden_act"],
            "layerscale_value": model.init_values,
            "query_bias": True,
            "key_bias": formats.has_key_biases(export.params),
            "value_bias": True,
            "rope_theta": model.rope_temperature,
            "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_temperature},
        }
    if model.num_classes:
        names = export.class_names or [f"LABEL_{i}" for i in range(model.num_classes)]
        config["id2label"] = {str(i): name for i, name in enumerate(names)}
        config["label2id"] = {name: i for i, name in enumerate(names)}
    return config


def dinov2_mlp_ratio(model) -> int:
    """Returns the ratio, a whole number, from which transformers' DINOv2 computes mlp_dim.

    Raises:
        UserError: there is none.
    """
    mlp_dim, is_swiglu = model.mlp_dim or 4 * model.width, model.mlp_layer == "swiglu"
    sizes = {}  # ratio -> what transformers computes from it
    exact = mlp_dim / model.width * (3 / 2 if is_swiglu else 1)
    for ratio in (math.floor(exact) or 1, math.ceil(exact)):
        size = ratio * model.width
        sizes[ratio] = (int(size * 2 / 3) + 7) // 8 * 8 if is_swiglu else size
        if sizes[ratio] == mlp_dim:
            return ratio
    raise UserError(
        f"The model has mlp_dim {mlp_dim}; with width {model.width} and mlp_layer "
        f"{model.mlp_layer!r}, in the format 'hf' DINOv2's must be "
        f"{' or '.join(map(str, sizes.values()))}"
    )


def hf_processor(export: Export) -> dict:
    """Returns the preprocessor_config.json of transformers."""
    height, width = export.image_size
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": hub.RESAMPLE_CODES[export.interpolation],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": per_channel(export.mean, export.channels),
        "image_std": per_channel(export.std, export.channels),
    }


def per_channel(values, channels: int) -> list[float]:
    return list(values) * (channels if len(values) == 1 else 1)


def one_or_pair(size) -> int | list[int]:
    height, width = size
    return height if height == width else [height, width]
