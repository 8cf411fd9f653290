"""Infers which model a set of parameters belongs to, from their names and shapes."""

import re
from collections.abc import Iterable, Sequence

import flax
import jax
import jax.numpy as jnp

from vit_jax.models import variants
from vit_jax.paths import (
    CLS,
    EMBEDDING,
    ENCODER_NORM,
    HEAD,
    LAYER_SCALE_0,
    MLP_GATE,
    MLP_IN,
    MLP_NORM,
    NORM_0,
    POSEMB,
    PRE_LOGITS,
    PRE_NORM,
    PROBE,
    QUERY,
    QUERY_NORM,
    REG,
    ROPE,
    STEM_ROOT,
    in_block,
    num_blocks,
)

Shapes = dict[str, tuple[int, ...]]

# Patterns of parameter names -> models that have such parameters, and can't be read.
OTHER_MODELS = (
    (r"^patch_embed\.backbone", "a hybrid from timm (hybrids are read from Google's .npz)"),
    (r"MixerBlock|token_mixing", "an MLP-Mixer"),
    (r"dist_token|head_dist|distillation_classifier", "a DeiT with a head for distillation"),
    (r"lambda_1|rel_pos_bias|^blocks\..*relative_position", "a BEiT"),
    (r"relative_position_bias_table|^(swin|layers\.\d+\.blocks)", "a Swin Transformer"),
    (r"text_model|transformer\.resblocks|(^|/)(img|txt)/", "an image-and-text model"),
    (r"decoder_blocks|decoder\.decoder_layers", "a masked autoencoder"),
    (r"running_mean|^resnet/|layer1\.0\.conv1|downsample", "a convolutional network"),
)


def recognize_other_model(names: Iterable[str]) -> str | None:
    """Returns which unsupported model parameters with these names belong to; None if unknown."""
    names = list(names)
    for pattern, model in OTHER_MODELS:
        if any(re.search(pattern, name) for name in names):
            return model
    return None


def describe_contents(names, config: dict) -> str:
    """Returns what a message says of parameters that aren't a Vision Transformer's."""
    declared = config.get("architectures")
    declared = declared or [config.get("architecture") or config.get("model_type")]
    parts = []
    if isinstance(declared, list) and declared[0]:
        parts.append(f"its config.json says {declared[0]}")
    if model := recognize_other_model(names):
        parts.append(f"it looks like {model}")
    return ", and ".join(parts) or f"its parameters are {', '.join(sorted(names)[:3])}, ..."


def param_shapes(model, image_shape: Sequence[int]) -> Shapes:
    """Returns {name: shape} of a model's parameters with unstacked blocks.

    Args:
        model: the VisionTransformer.
        image_shape: (height, width, channels).
    """
    unstacked = model.clone(scan=False)
    images = jnp.zeros((1, *image_shape))
    shapes = jax.eval_shape(lambda: unstacked.init(jax.random.key(0), images))["params"]
    flat = flax.traverse_util.flatten_dict(shapes, sep="/")
    return {name: leaf.shape for name, leaf in flat.items()}


def infer_fields(shapes: Shapes) -> dict:
    """Returns the fields of the `VisionTransformer` with these parameters.

    Fields that shapes don't show are those of Google's code and big_vision: positions that aren't
    learned are "sincos2d", and without a class token or a MAP head the tokens are averaged.

    Args:
        shapes: {name: shape}, with this code's names and unstacked blocks.

    Returns:
        Module fields; {} if these are not the parameters of a Vision Transformer.
    """
    kernel = shapes.get(f"{EMBEDDING}/kernel")
    query = shapes.get(in_block(0, f"{QUERY}/kernel"))
    if kernel is None or len(kernel) != 4 or query is None or len(query) != 3:
        return {}
    fields = {
        "patch_size": kernel[0] if kernel[0] == kernel[1] else kernel[:2],
        "width": kernel[-1],
        "depth": num_blocks(shapes),
        "num_heads": query[1],
        "mlp_dim": num_outputs(shapes, in_block(0, MLP_IN)),
        "pool": infer_pool(shapes),
        "reg_tokens": shapes.get(REG, (1, 0))[1],
        "rope": "mixed" if in_block(0, ROPE) in shapes else "none",
        "pre_norm": f"{PRE_NORM}/scale" in shapes,
        "norm_layer": "layernorm" if in_block(0, f"{NORM_0}/bias") in shapes else "rmsnorm",
        "qkv_bias": in_block(0, f"{QUERY}/bias") in shapes,
        "qk_norm": in_block(0, f"{QUERY_NORM}/scale") in shapes,
        "init_values": 1e-5 if in_block(0, f"{LAYER_SCALE_0}/gamma") in shapes else None,
        "mlp_layer": "swiglu" if in_block(0, f"{MLP_GATE}/kernel") in shapes else "mlp",
        "scale_mlp": in_block(0, f"{MLP_NORM}/scale") in shapes,
        "posemb": "learned" if POSEMB in shapes else "sincos2d",
        "norm": "pre" if f"{ENCODER_NORM}/scale" in shapes else "post",
        "representation_size": num_outputs(shapes, PRE_LOGITS),
        "num_classes": num_outputs(shapes, HEAD),
    }
    if f"{STEM_ROOT}/kernel" in shapes:
        fields["resnet"] = infer_resnet(shapes)
    return fields


def num_outputs(shapes: Shapes, module: str) -> int | None:
    """Returns the number of outputs of a dense layer; None if there is no such layer."""
    return shapes.get(f"{module}/bias", (None,))[0]


def infer_pool(shapes: Shapes) -> str:
    """Returns the field `pool`."""
    if PROBE in shapes:
        return "map"
    width, inputs = shapes[f"{EMBEDDING}/kernel"][-1], shapes.get(f"{HEAD}/kernel", (0,))[0]
    if inputs == 2 * width and PRE_LOGITS not in shapes:
        return "cls_gap"
    return "cls" if CLS in shapes else "gap"


def infer_resnet(shapes: Shapes) -> dict:
    """Returns the field `resnet` of a hybrid."""
    units = {}  # stage -> indices of its units
    for name in shapes:
        if match := re.match(r"block(\d+)/unit(\d+)/", name):
            units.setdefault(int(match[1]), set()).add(int(match[2]))
    factor = shapes[f"{STEM_ROOT}/kernel"][-1] / 64
    return {
        "num_layers": tuple(len(units[stage]) for stage in sorted(units)),
        "width_factor": int(factor) if factor == int(factor) else factor,
    }


def num_channels(shapes: Shapes) -> int:
    """Returns how many channels the model's images have."""
    return shapes.get(f"{STEM_ROOT}/kernel", shapes[f"{EMBEDDING}/kernel"])[-2]


def describe(fields: dict) -> str:
    """Returns the name of a published size, such as "ViT-B/16", or a list of the sizes."""
    for variant in (*variants.PUBLISHED, *variants.HYBRIDS):
        expected = {"resnet": None, **variants.fields(variant)}
        if all(fields.get(name) == value for name, value in expected.items()):
            return variant if variant.startswith("SoViT") else f"ViT-{variant}"
    kind = "a hybrid" if fields.get("resnet") else "a ViT"
    names = ("width", "depth", "num_heads", "mlp_dim", "patch_size")
    return f"{kind} of {', '.join(f'{name} {fields[name]}' for name in names)}"


def published_num_heads(width: int) -> int | None:
    """Returns the number of heads of the published size with this width; None if there is none."""
    # The size s has no published weights, and other models of its width other numbers of heads.
    published = [name for name in variants.PUBLISHED if not name.startswith("s/")]
    num_heads = {fields["width"]: fields["num_heads"] for fields in map(variants.fields, published)}
    # timm's: its test models, wee, little, medium, betwixt, so150m2, so150m, giantopt, DINOv3 7B.
    num_heads |= {64: 2, 96: 3, 256: 4, 320: 5, 512: 8, 640: 10, 832: 13, 896: 14, 1536: 16}
    num_heads |= {4096: 32}
    return num_heads.get(width)
