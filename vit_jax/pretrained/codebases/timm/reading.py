"""Reads timm's models: tensors, and config.json with the settings of model and evaluation."""

import re

from vit_jax.checks import SQUEEZE
from vit_jax.errors import UserError
from vit_jax.paths import CLS, REG
from vit_jax.pretrained.codebases.settings import (
    RESAMPLE_CODES,
    check_sizes,
    gelu_field,
    get_numbers,
    get_setting,
    get_size,
    resolve_num_heads,
    warn_unsupported,
)
from vit_jax.pretrained.codebases.timm.names import from_timm, has_swiglu

POOLS = {"token": "cls", "avg": "gap", "map": "map", "": "none"}

# Arguments of timm's models that are read, that show in the parameters, or that only concern
# training; others may change what a model computes.
ARGUMENTS = (
    *("img_size", "patch_size", "in_chans", "num_classes", "global_pool", "embed_dim", "depth"),
    *("num_heads", "mlp_ratio", "qkv_bias", "qk_norm", "proj_bias", "init_values", "class_token"),
    *("pos_embed", "no_embed_class", "reg_tokens", "num_reg_tokens", "pre_norm", "fc_norm"),
    *("use_fc_norm", "final_norm", "act_layer", "dynamic_img_size", "dynamic_img_pad"),
    *("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate"),
    *("drop_path_rate", "weight_init", "fix_init", "head_init_scale", "qkv_fused", "swiglu_mlp"),
    *("scale_mlp", "use_abs_pos_emb", "use_rot_pos_emb", "use_pre_transformer_norm"),
    *("use_post_transformer_norm", "rope_type", "rope_grid_indexing", "rope_temperature"),
    *("rope_rotate_half", "ref_feat_shape", "attn_type", "rope_shift_coords"),
    *("rope_jitter_coords", "rope_rescale_coords", "scale_mlp_norm"),
)

# Sizes in config.json -> fields of the model, which the tensors determine.
SIZES = {"embed_dim": "width", "depth": "depth"}

# Patterns of timm's names of architectures whose parameters have the names of models that can be
# read, but that compute something else.
OTHER_ARCHITECTURES = (
    (r"_rpn_", "normalizes the branches' outputs"),
    (r"vit_pe_|sapiens2", "has rotary positions of another kind"),
    (r"^test_vit3", "pools register tokens too"),
    (r"eva02_enormous", "normalizes the branches' outputs"),
)

# Patterns of timm's names of architectures -> the fields that they stand for, where they aren't
# timm's defaults and don't show in the parameters.
FIELDS_OF_NAMES = (
    (r"^vit_\w+_clip_", dict(layer_norm_eps=1e-5)),
    (r"_quickgelu_", dict(gelu="quick")),
    # The SigLIP models of timm 1.0.31 with the tanh GELU.
    (r"(base_patch32|so400m_patch16|giantopt_patch16)_siglip", dict(gelu="tanh")),
    (r"large_patch16_siglip\w*_512", dict(gelu="tanh")),
    (
        r"_(dinov3|lingbot)",
        dict(layer_norm_eps=1e-5, rope="axial", rope_temperature=100.0, rope_grid="centered"),
    ),
    (
        r"^eva02_(tiny|small|base|large)|_rope_reg\d",
        dict(rope="axial", rope_temperature=1e4, rope_grid=(16, 16)),
    ),
    (r"_rope_(ape_)?\d", dict(rope="axial", rope_temperature=100.0)),
    (r"_rope_mixed_", dict(rope="mixed", rope_temperature=10.0)),
    (r"giant_patch14_(reg\d_)?(dinov2|tipsv2)|giant_patch16_lingbot", dict(num_heads=24)),
    (r"huge_plus_patch16_dinov3", dict(num_heads=20)),
    (r"base_patch16_gap_224", dict(num_heads=16)),
    (r"reg\d_gap|^deit3|^flexivit|(reg\d_)(dinov2|tipsv2)|_ape_", dict(no_embed_class=True)),
    (r"so150m2?_patch16_reg|^test_vit", dict(no_embed_class=False)),
)


def read(path: str, tensors, width: int, config: dict, processor: dict, num_heads) -> dict:
    """Converts timm's `VisionTransformer` or `Eva` to fields of `Weights`.

    Args:
        path: for messages.
        tensors: the state dict.
        width: D.
        config, processor: config.json and preprocessor_config.json; {} if missing.
        num_heads: used if the config doesn't specify it; None: the published size's.

    Raises:
        UserError: a model that this code doesn't have, or an impossible setting.
    """
    arguments = get_setting(config, path, "model_args", dict, {})
    pretrained = get_setting(config, path, "pretrained_cfg", dict, config)
    name = get_setting(config, path, "architecture", str, "")
    check_supported(path, tensors, name, arguments)
    known = fields_of_name(name)
    num_heads = known.get("num_heads") if num_heads is None else num_heads
    num_heads = get_setting(arguments, path, "num_heads", int, num_heads)
    fields = {
        "layer_norm_eps": 1e-6,
        "norm": "pre",
        **known,
        "posemb": "learned" if "pos_embed" in tensors else "none",
        "pool": pool_field(path, tensors, config, arguments),
        "pool_norm": "after" if "fc_norm.weight" in tensors else "before",
    }
    if has_swiglu(tensors):
        activation = get_setting(arguments, path, "act_layer", str, "silu")
        if activation not in ("silu", "swish"):
            raise UserError(f"{path}: its gated MLPs have {activation!r}; only 'silu' is supported")
    else:
        activation = {"tanh": "gelu_tanh", "quick": "quick_gelu"}.get(known.get("gelu"), "gelu")
        activation = get_setting(arguments, path, "act_layer", str, activation)
        fields["gelu"] = gelu_field(path, activation)
    if num_heads is not None and ("num_heads" in arguments or "num_heads" in known):
        fields["num_heads"] = num_heads
    default = fields.pop("no_embed_class", None)
    no_embed_class = get_setting(arguments, path, "no_embed_class", bool, default)
    num_heads = resolve_num_heads(path, num_heads, width)
    image_size = get_size(arguments, path, "img_size")
    if image_size is None:
        input_size = get_setting(pretrained, path, "input_size", list, [])
        image_size = tuple(input_size[1:]) or None
    names = config.get("label_names") or pretrained.get("label_names")
    params = from_timm(tensors, num_heads, complete_rope(path, name, arguments, fields))
    check_sizes(path, arguments, SIZES, params)
    num_rows = sum(params[name].shape[1] for name in (CLS, REG) if name in params)
    return dict(
        params=params,
        # timm's default is a row, but its FlexiViT models have none and don't say so.
        prefix_rows=(num_rows, 0) if no_embed_class is None else (num_rows * (not no_embed_class),),
        fields=fields,
        mean=get_numbers(pretrained, path, "mean"),
        std=get_numbers(pretrained, path, "std"),
        image_size=image_size,
        eval_crop=eval_crop(path, pretrained) if pretrained else None,
        eval_method=eval_method(path, pretrained) if pretrained else None,
        class_names=tuple(map(str, names)) if isinstance(names, list) else None,
    )


def check_supported(path: str, tensors, name: str, arguments: dict) -> None:
    """Raises UserError for a model of timm that this code doesn't have, with its reason."""
    for pattern, reason in OTHER_ARCHITECTURES:
        if re.search(pattern, name):
            raise UserError(f"{path} can't be read: timm's {name} {reason}, which isn't supported")
    if "norm.weight" not in tensors and "fc_norm.weight" not in tensors:
        raise UserError(f"{path} can't be read: it has no norm after its blocks")
    is_eva = any(".gamma_1" in n or ".q_bias" in n or ".fc1_g." in n for n in tensors)
    if is_eva and not name:
        raise UserError(
            f"{path} looks like an EVA-02 or another model with rotary positions, which its "
            "parameters don't show: give the folder, with config.json"
        )
    for argument, value in arguments.items():
        if argument not in ARGUMENTS and value not in (None, False):
            raise UserError(
                f"{path} can't be read: its model_args have {argument}={value!r}, which isn't "
                "supported"
            )


def fields_of_name(name: str) -> dict:
    """Returns the fields that the name of an architecture of timm stands for."""
    fields = {}
    for pattern, values in FIELDS_OF_NAMES:
        if re.search(pattern, name):
            fields |= values
    return fields


def complete_rope(path: str, name: str, arguments: dict, fields: dict) -> str | None:
    """Completes the fields of rotary positions; returns the layout for `from_timm`."""
    if "use_rot_pos_emb" in arguments and not arguments["use_rot_pos_emb"]:
        for field in ("rope", "rope_temperature", "rope_grid"):
            fields.pop(field, None)
    elif arguments.get("use_rot_pos_emb"):
        kinds = {"cat": "axial", "dinov3": "axial", "mixed": "mixed"}
        kind = get_setting(arguments, path, "rope_type", str, "cat")
        if kind not in kinds:
            raise UserError(f"{path}: its rope_type is {kind!r}, which isn't supported")
        fields |= {"rope": kinds[kind], "rope_temperature": 1e4, "rope_grid": "index"}
        if kind == "dinov3":
            fields["rope_grid"] = "centered"
    if "rope" not in fields:
        return None
    temperature = fields["rope_temperature"]
    temperature = get_setting(arguments, path, "rope_temperature", (int, float), temperature)
    fields["rope_temperature"] = float(temperature)
    if (grid := get_size(arguments, path, "ref_feat_shape")) is not None:
        fields["rope_grid"] = grid
    is_half = "dinov3" in name or "lingbot" in name
    if get_setting(arguments, path, "rope_rotate_half", bool, is_half):
        return "half"
    if fields["rope"] == "mixed":
        return "pairs_mixed"
    indexing = "xy" if re.search(r"_rope_(ape_)?\d", name) else "ij"
    indexing = get_setting(arguments, path, "rope_grid_indexing", str, indexing)
    return "pairs_xy" if indexing == "xy" else "pairs"


def pool_field(path: str, tensors, config: dict, arguments: dict) -> str:
    """Returns the field `pool`, from timm's config or, without one, from the tensors."""
    has_class_token = "cls_token" in tensors
    default = "token" if has_class_token and "fc_norm.weight" not in tensors else "avg"
    default = "map" if "attn_pool.latent" in tensors else default
    pool = get_setting(config, path, "global_pool", str, default)
    pool = get_setting(arguments, path, "global_pool", str, pool)
    if pool not in POOLS:
        raise UserError(f"{path}: its model pools by {pool!r}, which isn't supported")
    return POOLS[pool]


def eval_crop(path: str, settings: dict) -> float | str:
    """Returns the `eval_crop` of timm's pretrained_cfg; the defaults are timm's."""
    share = get_setting(settings, path, "crop_pct", (int, float)) or 0.875
    mode = get_setting(settings, path, "crop_mode", str, "center")
    if mode not in ("center", "squash"):
        warn_unsupported(path, "crop_mode", mode, "center")
    if mode == "squash" and share != 1.0:  # a crop of what was squeezed
        warn_unsupported(path, "crop_pct of images that are squashed", share, 1.0)
    return SQUEEZE if mode == "squash" else share


def eval_method(path: str, settings: dict) -> str:
    """Returns the `eval_method` of timm's pretrained_cfg; the default is timm's."""
    method = get_setting(settings, path, "interpolation", str, "bicubic")
    if method in RESAMPLE_CODES:
        return method
    return warn_unsupported(path, "interpolation", method, "bicubic")
