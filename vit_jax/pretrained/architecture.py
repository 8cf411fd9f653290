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
    MLP_IN,
    POSEMB,
    PRE_LOGITS,
    PROBE,
    QUERY,
    STEM_ROOT,
    in_block,
    num_blocks,
)

Shapes = dict[str, tuple[int, ...]]

# Patterns of parameter names -> models that have such parameters, and can't be read.
OTHER_MODELS = (
    (r"^patch_embed\.backbone", "a hybrid from timm (hybrids are read from Google's .npz)"),
    (r"MixerBlock|token_mixing", "an MLP-Mixer"),
    (r"dist_token|distillation_token|head_dist", "a distilled DeiT"),
    (r"lambda_1|gamma_1$|rel_pos_bias", "a BEiT"),
    (r"relative_position_bias_table|^(swin|layers\.\d+\.blocks)", "a Swin Transformer"),
    (r"text_model|transformer\.resblocks|(^|/)(img|txt)/", "an image-and-text model"),
    (r"register_tokens|reg_token", "a Vision Transformer with register tokens"),
    (r"layer_scale|\.ls1\.", "a Vision Transformer with LayerScale"),
    (r"norm_pre|pre_layrnorm", "a Vision Transformer with a norm before its blocks"),
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
        "mlp_dim": bias_size(shapes, in_block(0, MLP_IN)),
        "pool": infer_pool(shapes),
        "posemb": "learned" if POSEMB in shapes else "sincos2d",
        "norm": "pre" if f"{ENCODER_NORM}/scale" in shapes else "post",
        "representation_size": bias_size(shapes, PRE_LOGITS),
        "num_classes": bias_size(shapes, HEAD),
    }
    if f"{STEM_ROOT}/kernel" in shapes:
        fields["resnet"] = infer_resnet(shapes)
    return fields


def bias_size(shapes: Shapes, module: str) -> int | None:
    """Returns the number of outputs of a dense layer; None if there is no such layer."""
    return shapes.get(f"{module}/bias", (None,))[0]


def infer_pool(shapes: Shapes) -> str:
    """Returns the field `pool`."""
    if PROBE in shapes:
        return "map"
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
    num_heads |= {1536: 16}  # timm's giantopt
    return num_heads.get(width)
