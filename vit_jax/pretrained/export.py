"""Parameters as files that Google's code, timm and transformers load as they are."""

import json
import math
from collections.abc import Sequence

import flax
import jax
import numpy as np
import safetensors.numpy
from etils import epath

from vit_jax.errors import UserError
from vit_jax.models import posemb
from vit_jax.models.stacking import unstack_blocks
from vit_jax.paths import POSEMB, differing_shapes
from vit_jax.pretrained import architecture, formats
from vit_jax.pretrained.weights import KEEP, MEAN, STD

FORMATS = ("google", "timm", "hf")

# What each of the other codes can compute; a field that isn't there, its config can tell it.
CAN = {
    "google": dict(
        gelu=("tanh",),
        layer_norm_eps=(1e-6,),
        pool=("cls", "gap", "none"),
        pool_norm=("before",),
        norm=("pre",),
    ),
    "timm": dict(
        layer_norm_eps=(1e-6,),
        pool=("cls", "gap", "map"),
        norm=("pre",),
        representation_size=(None,),
        resnet=(None,),
    ),
    "hf": dict(
        pool=("cls",),
        pool_norm=("before",),
        norm=("pre",),
        representation_size=(None,),
        resnet=(None,),
    ),
}
# What may differ with `approximate`.
APPROXIMATELY = ("gelu", "layer_norm_eps")


def save(
    params,
    path,
    format: str,
    *,
    model,
    image_size: Sequence[int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    keep: float | None = None,
    class_names: Sequence[str] | None = None,
    approximate: bool = False,
) -> None:
    """Writes parameters for another codebase.

    "google": an `.npz` as under gs://vit_models. "timm": a `.safetensors` file, or a folder that
    `timm.create_model("local-dir:FOLDER", pretrained=True)` takes. "hf": a folder for
    `ViTForImageClassification.from_pretrained` (without a head: `ViTModel`). Fixed positions are
    written out as a table. What these formats hold, `pretrained.load` gives back bit for bit.

    Args:
        params: of `model`, on any devices.
        path: of the file or the folder; local or gs://.
        image_size: (height, width); None: that of a square grid of positions.
        mean, std: of the normalisation of pixels in [0, 1]; None: 0.5.
        keep: the part of the resized image's shorter side that evaluation sees; None: 0.875.
            transformers' processor doesn't crop.
        class_names: for `config.json`.
        approximate: whether to write what the other code computes with another GELU or another
            epsilon in LayerNorm than `model`.

    Raises:
        UserError: an unknown format, a model that the other code doesn't have, by field, parameters
            of another model, or a place that can't be written to.
    """
    if format not in FORMATS:
        raise UserError(f"format is {format!r}; it can be {', '.join(map(repr, FORMATS))}")
    mean, std = tuple(mean or MEAN), tuple(std or STD)
    check(model, format, approximate)
    if format == "google" and set(mean + std) != {0.5} and not approximate:
        raise UserError(
            f"Google's code normalises images with mean and std 0.5, not {mean} and {std}: "
            "--approximate (approximate=True) writes the parameters all the same"
        )
    if class_names is not None and len(class_names) != model.num_classes:
        raise UserError(f"{len(class_names)} class names for a head of {model.num_classes} classes")
    flat = flattened(params, model)
    size = image_size_of(flat, model, image_size)
    check_shapes(flat, model, size)
    if model.posemb != "learned":  # the other codes learn theirs
        grid = model.grid(size)
        flat[POSEMB] = posemb.table(model.posemb, *grid, model.width, "cls" in flat)
    path = epath.Path(path)
    try:
        if format == "google":
            write_npz(path, formats.to_google(flat))
        elif format == "timm":
            write_timm(path, flat, model, size, mean, std, keep or KEEP, class_names)
        else:
            write_hf(path, flat, model, size, mean, std, class_names)
    except OSError as error:
        raise UserError(f"{path} can't be written: {error.strerror or error}") from None


def flattened(params, model) -> dict[str, np.ndarray]:
    """float32 arrays on the host by name, blocks one by one."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), jax.device_get(params))
    params = jax.tree.map(np.asarray, unstack_blocks(params)) if model.scan else params
    return flax.traverse_util.flatten_dict(params, sep="/")


def check_shapes(flat, model, image_size) -> None:
    """Raises UserError where the parameters aren't the model's; the first that differs is named."""
    expected = architecture.parameters(model, (*image_size, channels_of(flat)))
    found = {name: value.shape for name, value in flat.items()}
    for name, there, here in differing_shapes(found, expected):
        raise UserError(f"The parameters aren't this model's: {name} is {there}, not {here}")


def write_timm(path: epath.Path, flat, model, size, mean, std, keep, class_names) -> None:
    theirs = formats.to_timm(flat, norm_after_pool=model.pool_norm == "after")
    if path.suffix == ".safetensors":
        write_files(path.parent, {path.name: theirs})
    else:
        config = timm_config(flat, model, size, mean, std, keep, class_names)
        write_files(path, {"config.json": config, "model.safetensors": theirs})


def write_hf(path: epath.Path, flat, model, size, mean, std, class_names) -> None:
    files = {
        "config.json": hf_config(flat, model, size, class_names),
        "preprocessor_config.json": hf_processor(flat, size, mean, std),
        "model.safetensors": formats.to_hf(flat, "vit." if model.num_classes else ""),
    }
    write_files(path, files)


def check(model, format: str, approximate: bool) -> None:
    """Raises UserError where the other code would compute something else."""
    for name, values in CAN[format].items():
        value = getattr(model, name)
        if value in values or (approximate and name in APPROXIMATELY):
            continue
        known = ", ".join(map(repr, values))
        way = ": --approximate (approximate=True) writes it all the same"
        raise UserError(
            f"The format {format!r} has no model with {name} {value!r}, only with {known}"
            f"{way if name in APPROXIMATELY else ''}"
        )


def image_size_of(flat, model, image_size) -> tuple[int, int]:
    if image_size is not None:
        return tuple(image_size[:2])
    if POSEMB not in flat:
        raise UserError("The parameters have no positions to tell the images' size from: give it")
    num_positions = flat[POSEMB].shape[1] - ("cls" in flat)
    side = math.isqrt(num_positions)
    if side * side != num_positions:
        raise UserError(f"The {num_positions} positions are no square grid: give image_size")
    return tuple(side * pixels for pixels in model.token_pixels)


def timm_config(flat, model, image_size, mean, std, keep, class_names) -> dict:
    """What timm writes beside its weights, with the arguments that make this model of its B/16."""
    channels = channels_of(flat)
    pool = {"cls": "token", "gap": "avg", "map": "map"}[model.pool]
    arguments = {
        "img_size": list(image_size),
        "patch_size": list(model.patch_shape),
        "in_chans": channels,
        "embed_dim": model.width,
        "depth": model.depth,
        "num_heads": model.num_heads,
        "mlp_ratio": mlp_ratio(model),
        "global_pool": pool,
        "class_token": model.pool == "cls",
        "fc_norm": model.pool_norm == "after",
        "no_embed_class": False,
        "act_layer": "gelu_tanh" if model.gelu == "tanh" else "gelu",
    }
    config = {
        "architecture": "vit_base_patch16_224",
        "num_classes": model.num_classes or 0,
        "num_features": model.width,
        "global_pool": pool,
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [channels, *image_size],
            "fixed_input_size": True,
            "interpolation": "bilinear",
            "crop_pct": keep,
            "mean": per_channel(mean, channels),
            "std": per_channel(std, channels),
            "num_classes": model.num_classes or 0,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    return config | ({"label_names": list(class_names)} if class_names else {})


def channels_of(flat) -> int:
    return architecture.channels({name: value.shape for name, value in flat.items()})


def mlp_ratio(model) -> float:
    """The ratio whose product with the width timm cuts down to mlp_dim."""
    mlp_dim = model.mlp_dim or 4 * model.width
    ratio = mlp_dim / model.width
    return ratio if int(model.width * ratio) == mlp_dim else math.nextafter(ratio, math.inf)


def hf_config(flat, model, image_size, class_names) -> dict:
    """config.json of transformers."""
    config = {
        "architectures": ["ViTForImageClassification" if model.num_classes else "ViTModel"],
        "model_type": "vit",
        "hidden_size": model.width,
        "num_hidden_layers": model.depth,
        "num_attention_heads": model.num_heads,
        "intermediate_size": model.mlp_dim or 4 * model.width,
        "hidden_act": "gelu_pytorch_tanh" if model.gelu == "tanh" else "gelu",
        "layer_norm_eps": model.layer_norm_eps,
        "image_size": one_or_pair(image_size),
        "patch_size": one_or_pair(model.patch_shape),
        "num_channels": channels_of(flat),
        "qkv_bias": True,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    if model.num_classes:
        names = class_names or [f"LABEL_{i}" for i in range(model.num_classes)]
        config["id2label"] = {str(i): name for i, name in enumerate(names)}
        config["label2id"] = {name: i for i, name in enumerate(names)}
    return config


def hf_processor(flat, image_size, mean, std) -> dict:
    """preprocessor_config.json of transformers."""
    channels = channels_of(flat)
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": image_size[0], "width": image_size[1]},
        "resample": 2,  # bilinear
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": per_channel(mean, channels),
        "image_std": per_channel(std, channels),
    }


def per_channel(values, channels: int) -> list[float]:
    return list(values) * (channels if len(values) == 1 else 1)


def one_or_pair(size) -> int | list[int]:
    height, width = size
    return height if height == width else [height, width]


def write_npz(path: epath.Path, flat) -> None:
    if path.suffix != ".npz":
        raise UserError(f"{path}: the format 'google' is a file whose name ends in .npz")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    with unfinished.open("wb") as file:
        np.savez(file, **flat)
    unfinished.replace(path)


def write_files(folder: epath.Path, files: dict) -> None:
    """Names -> JSON objects or tensors, each written all at once."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if name.endswith(".json"):
            content = (json.dumps(content, indent=2) + "\n").encode()
        else:
            tensors = {n: np.ascontiguousarray(value) for n, value in content.items()}
            content = safetensors.numpy.save(tensors, metadata={"format": "pt"})
        unfinished = folder / f"{name}.tmp"
        unfinished.write_bytes(content)
        unfinished.replace(folder / name)
