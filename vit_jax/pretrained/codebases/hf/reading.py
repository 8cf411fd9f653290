"""Reads models of transformers: tensors, and the settings of model and processor."""

from vit_jax.checks import SQUEEZE
from vit_jax.errors import UserError
from vit_jax.paths import REG
from vit_jax.pretrained.codebases.architecture import describe_contents
from vit_jax.pretrained.codebases.hf.names import from_hf
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

# What the models of transformers compute, by model_type, as far as config.json may leave it out:
# `pools`: of a model with a head for classes, and of one without (None: isn't supported).
FAMILIES = {
    "vit": dict(layer_norm_eps=1e-12, activation="gelu", pools=("cls", "cls")),
    "deit": dict(layer_norm_eps=1e-12, activation="gelu", pools=("cls", "cls"), embed_reg=True),
    "vit_mae": dict(layer_norm_eps=1e-12, activation="gelu", pools=(None, "none")),
    "ijepa": dict(layer_norm_eps=1e-12, activation="gelu", pools=("gap", "none")),
    "dinov2": dict(layer_norm_eps=1e-6, activation="gelu", pools=("cls_gap", "cls")),
    "dinov2_with_registers": dict(layer_norm_eps=1e-6, activation="gelu", pools=("cls_gap", "cls")),
    "dinov3_vit": dict(
        layer_norm_eps=1e-5,
        activation="gelu",
        pools=("cls", "cls"),
        posemb="none",
        rope="axial",
        rope_grid="centered",
    ),
    "clip_vision_model": dict(
        layer_norm_eps=1e-5, activation="quick_gelu", pools=(None, "cls"), pool_norm="after"
    ),
    "siglip_vision_model": dict(
        layer_norm_eps=1e-6, activation="gelu_pytorch_tanh", pools=(None, "map")
    ),
}

# Sizes in config.json -> fields of the model, which the tensors determine.
SIZES = {"hidden_size": "width", "num_hidden_layers": "depth", "intermediate_size": "mlp_dim"}


def vision_config(path: str, config: dict) -> dict:
    """Returns the config of the vision model of an image-and-text model; others as they are."""
    vision = get_setting(config, path, "vision_config", dict, {})
    model_type = f"{get_setting(config, path, 'model_type', str, 'vit')}_vision_model"
    if not vision or model_type not in FAMILIES:
        return config
    return {"image_size": 224, **vision, "model_type": model_type}


def read(path: str, tensors, width: int, config: dict, processor: dict, num_heads) -> dict:
    """Converts a model of transformers to fields of `Weights`.

    Args:
        path: for messages.
        tensors: the state dict.
        width: D.
        config, processor: config.json and preprocessor_config.json; {} if missing.
        num_heads: used if the config doesn't specify it; None: the published size's.

    Raises:
        UserError: a model that this code doesn't have, or an impossible setting.
    """
    model_type = get_setting(config, path, "model_type", str, "vit")
    family = FAMILIES[model_type]
    num_heads = get_setting(config, path, "num_attention_heads", int, num_heads)
    fields = {"pool_norm": "before", "norm": "pre", "posemb": "learned", **family}
    activation, pools = fields.pop("activation"), fields.pop("pools")
    has_head = any("classifier." in name for name in tensors)
    fields["pool"] = pools[0] if has_head else pools[1]
    if fields["pool"] is None:
        raise UserError(f"{path} can't be read: {describe_contents(tensors, config)}")
    if fields["pool"] == "map" and not any(name.endswith("head.probe") for name in tensors):
        fields["pool"] = "none"
    eps = get_setting(config, path, "layer_norm_eps", (int, float), fields["layer_norm_eps"])
    fields["layer_norm_eps"] = eps
    if not any(".gate_proj." in name or ".weights_in." in name for name in tensors):
        hidden_act = get_setting(config, path, "hidden_act", str, activation)
        fields["gelu"] = gelu_field(path, hidden_act)
    if "num_attention_heads" in config:
        fields["num_heads"] = num_heads
    if model_type == "dinov3_vit":
        fields["rope_temperature"] = rope_temperature(path, config)
    if get_setting(config, path, "pooler_act", str, "tanh") != "tanh":
        # Only a tanh layer is a representation layer.
        tensors = {name: value for name, value in tensors.items() if "pooler." not in name}
    multi_label = config.get("problem_type") == "multi_label_classification"
    check_rescaling(path, processor)
    normalizes = get_setting(processor, path, "do_normalize", bool, True)
    params = from_hf(tensors, resolve_num_heads(path, num_heads, width), model_type)
    if params.get(REG) is not None and not params[REG].shape[1]:
        del params[REG]
    check_sizes(path, config, SIZES, params)
    num_reg = params[REG].shape[1] if REG in params else 0
    return dict(
        params=params,
        fields=fields,
        prefix_rows=(1 + num_reg * fields.get("embed_reg", False),),
        mean=get_numbers(processor, path, "image_mean") if normalizes else (0.0,),
        std=get_numbers(processor, path, "image_std") if normalizes else (1.0,),
        image_size=get_size(config, path, "image_size"),
        eval_crop=eval_crop(path, processor) if processor else None,
        eval_method=eval_method(path, processor) if processor else None,
        class_names=class_names(get_setting(config, path, "id2label", dict, {})),
        loss="sigmoid" if multi_label else None,
    )


def rope_temperature(path: str, config: dict) -> float:
    """Returns the field `rope_temperature` of a DINOv3 of transformers."""
    parameters = get_setting(config, path, "rope_parameters", dict, {})
    kind = get_setting(parameters, path, "rope_type", str, "default")
    if kind != "default":
        raise UserError(f"{path}: its rotary positions are {kind!r}, which isn't supported")
    theta = get_setting(config, path, "rope_theta", (int, float), 100.0)
    return float(get_setting(parameters, path, "rope_theta", (int, float), theta))


def check_rescaling(path: str, processor: dict) -> None:
    """Raises UserError unless pixels are scaled to [0, 1] before they are normalized."""
    factor = get_setting(processor, path, "rescale_factor", (int, float), 1 / 255)
    if not get_setting(processor, path, "do_rescale", bool, True) or abs(factor * 255 - 1) > 1e-3:
        raise UserError(
            f"{path}: preprocessor_config.json doesn't scale pixels by 1/255, which isn't supported"
        )


def eval_crop(path: str, processor: dict) -> float | str:
    """Returns the `eval_crop` of a processor: the share of the shorter side, or SQUEEZE.

    If images are squeezed and then cropped, they are only cropped here.
    """
    crop, resized = processor.get("crop_size"), processor.get("size")
    if not processor.get("do_center_crop") or not crop or not resized:
        keeps_proportions = isinstance(resized, dict) and "shortest_edge" in resized
        return 1.0 if keeps_proportions else SQUEEZE
    sides = []
    for size in (crop, resized):
        side = min(size.values(), default=None) if isinstance(size, dict) else size
        if not isinstance(side, int) or side < 1:
            raise UserError(
                f"{path}: size is {resized} and crop_size {crop}; both must be in pixels, above 0"
            )
        sides.append(side)
    return min(sides[0] / sides[1], 1.0)


def eval_method(path: str, processor: dict) -> str:
    """Returns the `eval_method` of a processor; the default is that of ViTImageProcessor."""
    code = get_setting(processor, path, "resample", int, RESAMPLE_CODES["bilinear"])
    for method, known in RESAMPLE_CODES.items():
        if code == known:
            return method
    return warn_unsupported(path, "resample", code, "bilinear")


def class_names(id2label: dict) -> tuple[str, ...] | None:
    """Returns the names in the order of the labels; None for transformers' placeholders."""
    names = {int(label): str(name) for label, name in id2label.items() if str(label).isdigit()}
    if all(name == f"LABEL_{label}" for label, name in names.items()):
        return None
    return tuple(names.get(label, f"class {label}") for label in range(max(names) + 1))
