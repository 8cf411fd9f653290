"""Writes models for transformers: tensors, and the settings of model and processor."""

import math

from etils import epath

from vit_jax.errors import UserError
from vit_jax.paths import MASK_TOKEN
from vit_jax.pretrained.codebases.files import write_files
from vit_jax.pretrained.codebases.hf.names import has_key_biases, has_mask_token, to_hf
from vit_jax.pretrained.codebases.settings import RESAMPLE_CODES
from vit_jax.pretrained.codebases.writing import ANY, Export, per_channel, unrepresentable

# The models that transformers has as a ViT; see `writing.unrepresentable`.
REPRESENTABLE = dict(
    gelu=("tanh", "exact"),
    layer_norm_eps=ANY,
    pool=("cls",),
    pool_norm=("before",),
    class_token=(None, True),
    norm=("pre",),
    representation_size=(None,),
    resnet=(None,),
)

# What other models of transformers have, by model_type: a model is written as the first that has
# all of its fields, or else as a ViT.
OTHERS = {
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

CLASSES = {  # model_type -> its class, and its class with a head
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
ACTIVATIONS = {"tanh": "gelu_pytorch_tanh", "exact": "gelu", "quick": "quick_gelu"}


def representable(model, approximate: bool) -> dict:
    """Returns the values of the model's fields that transformers has.

    Raises:
        UserError: an MLP that DINOv2 can't have.
    """
    model_type = find_model_type(model, approximate)
    if model_type.startswith("dinov2"):
        mlp_ratio(model)
    return REPRESENTABLE | OTHERS.get(model_type, {})


def keeps_mask_token(model) -> bool:
    """Whether a token for masked patches has a place in the model of transformers."""
    return has_mask_token(find_model_type(model, approximate=True))


def find_model_type(model, approximate: bool = False) -> str:
    """Returns the model_type of transformers that has all fields of a model; else "vit"."""
    is_vit = not any(unrepresentable(model, REPRESENTABLE, approximate))
    for model_type, fields in OTHERS.items():
        if is_vit:
            break
        if model_type.startswith("dino") and model.init_values is None:
            continue
        has_head = bool(model.num_classes)
        if model_type.startswith("dinov2") and has_head != (model.pool == "cls_gap"):
            continue
        if model_type == "ijepa" and has_head != (model.pool == "gap"):
            continue
        if not any(unrepresentable(model, REPRESENTABLE | fields, approximate)):
            return model_type
    return "vit"


def writes_file(path: epath.Path) -> bool:
    """Whether a path is a file to write, rather than a folder."""
    return False


def write(path: epath.Path, export: Export) -> None:
    """Writes a folder with model.safetensors and the settings of model and processor."""
    model_type = find_model_type(export.model, approximate=True)
    tensors = to_hf(export.params, model_type)
    files = {
        "config.json": config_json(export, model_type),
        "preprocessor_config.json": processor_json(export),
        "model.safetensors": tensors,
    }
    write_files(path, files)


def config_json(export: Export, model_type: str) -> dict:
    """Returns the config.json of transformers."""
    model = export.model
    config = {
        "architectures": [CLASSES[model_type][bool(model.num_classes)]],
        "model_type": model_type,
        "hidden_size": model.width,
        "num_hidden_layers": model.depth,
        "num_attention_heads": model.num_heads,
        "intermediate_size": model.mlp_dim or 4 * model.width,
        "hidden_act": ACTIVATIONS[model.gelu],
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
            "mlp_ratio": mlp_ratio(model),
            "use_swiglu_ffn": model.mlp_layer == "swiglu",
            "layerscale_value": model.init_values,
            "use_mask_token": model_type != "dinov2" or MASK_TOKEN in export.params,
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
            "key_bias": has_key_biases(export.params),
            "value_bias": True,
            "rope_theta": model.rope_temperature,
            "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_temperature},
        }
    if model.num_classes:
        names = export.class_names or [f"LABEL_{i}" for i in range(model.num_classes)]
        config["id2label"] = {str(i): name for i, name in enumerate(names)}
        config["label2id"] = {name: i for i, name in enumerate(names)}
    return config


def mlp_ratio(model) -> int:
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


def processor_json(export: Export) -> dict:
    """Returns the preprocessor_config.json of transformers."""
    height, width = export.image_size
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": RESAMPLE_CODES[export.interpolation],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": per_channel(export.mean, export.channels),
        "image_std": per_channel(export.std, export.channels),
    }


def one_or_pair(size) -> int | list[int]:
    height, width = size
    return height if height == width else [height, width]
