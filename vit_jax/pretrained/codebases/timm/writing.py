"""Writes models for timm: its tensors, and the config.json that turns its B/16 into this model."""

import math

from etils import epath

from vit_jax.checks import SQUEEZE
from vit_jax.errors import UserError
from vit_jax.pretrained.codebases.files import write_files
from vit_jax.pretrained.codebases.timm.names import to_timm
from vit_jax.pretrained.codebases.writing import ANY, Export, per_channel

# The models that timm has; see `writing.unrepresentable`.
REPRESENTABLE = dict(
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
)


def representable(model, approximate: bool) -> dict:
    """Returns the values of the model's fields that timm has.

    Raises:
        UserError: the model has a SwiGLU, and what timm's can't have beside it.
    """
    if model.mlp_layer == "swiglu":
        check_swiglu(model, approximate)
    return REPRESENTABLE


def check_swiglu(model, approximate: bool) -> None:
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


def keeps_mask_token(model) -> bool:
    """Whether a token for masked patches has a place in timm's model."""
    return False


def writes_file(path: epath.Path) -> bool:
    """Whether a path is a file to write, rather than a folder."""
    return path.suffix == ".safetensors"


def write(path: epath.Path, export: Export) -> None:
    """Writes a .safetensors file, or a folder with one and config.json."""
    tensors = to_timm(export.params, export.model)
    if writes_file(path):
        write_files(path.parent, {path.name: tensors})
    else:
        write_files(path, {"config.json": config_json(export), "model.safetensors": tensors})
        (path / "preprocessor_config.json").unlink(missing_ok=True)  # of a model that was there


def config_json(export: Export) -> dict:
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
