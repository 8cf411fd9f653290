"""Which model a set of parameters is of, told from their names and shapes."""

import re
from collections.abc import Sequence

import flax
import jax
import jax.numpy as jnp

from vit_jax.models import variants
from vit_jax.paths import POSEMB, QUERY, num_blocks

# Parts of parameters' names -> what has them.
OTHERS = (
    (r"^patch_embed\.backbone", "a hybrid of timm's, of which Google's .npz can be read"),
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


def looks_like(names) -> str | None:
    """What a file with such parameters is of, where it's none of ours."""
    for pattern, what in OTHERS:
        if any(re.search(pattern, name) for name in names):
            return what
    return None


def parameters(model, image_shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of a model's parameters (flat, blocks one by one), for such images."""
    plain = model.clone(scan=False)
    images = jnp.zeros((1, *image_shape))
    shapes = jax.eval_shape(lambda: plain.init(jax.random.key(0), images))["params"]
    flat = flax.traverse_util.flatten_dict(shapes, sep="/")
    return {name: leaf.shape for name, leaf in flat.items()}


def fields(shapes: dict[str, tuple[int, ...]]) -> dict:
    """Fields of the `VisionTransformer` with these parameters (ours, flat, blocks one by one).

    What leaves no trace in them is taken as Google and big_vision have it: positions that aren't
    learned are "sincos2d", tokens without a class token or a pooling head are averaged. {} where
    they are of no Vision Transformer.
    """
    kernel = shapes.get("embedding/kernel")
    query = shapes.get(f"Transformer/encoderblock_0/{QUERY}/kernel")
    if kernel is None or len(kernel) != 4 or query is None or len(query) != 3:
        return {}
    found = {
        "patch_size": kernel[0] if kernel[0] == kernel[1] else kernel[:2],
        "width": kernel[-1],
        "depth": num_blocks(shapes),
        "num_heads": query[1],
        "mlp_dim": shapes.get("Transformer/encoderblock_0/MlpBlock_0/Dense_0/bias", (None,))[0],
        "pool": pooling(shapes),
        "posemb": "learned" if POSEMB in shapes else "sincos2d",
        "norm": "pre" if "Transformer/encoder_norm/scale" in shapes else "post",
        "representation_size": shapes.get("pre_logits/bias", (None,))[0],
        "num_classes": shapes.get("head/bias", (None,))[0],
    }
    if "conv_root/kernel" in shapes:
        found["resnet"] = stem(shapes)
    return found


def channels(shapes: dict[str, tuple[int, ...]]) -> int:
    """Of the images of the model with these parameters."""
    return shapes.get("conv_root/kernel", shapes["embedding/kernel"])[-2]


def pooling(shapes) -> str:
    if "MAPHead_0/probe" in shapes:
        return "map"
    return "cls" if "cls" in shapes else "gap"


def stem(shapes) -> dict:
    """The `resnet` field: units of each stage, and the width."""
    units = {}
    for name in shapes:
        if match := re.match(r"block(\d+)/unit(\d+)/", name):
            units.setdefault(int(match[1]), set()).add(int(match[2]))
    factor = shapes["conv_root/kernel"][-1] / 64
    width_factor = int(factor) if factor == int(factor) else factor
    return {
        "num_layers": tuple(len(units[stage]) for stage in sorted(units)),
        "width_factor": width_factor,
    }


def describe(fields: dict) -> str:
    """The name of a published size, such as "ViT-B/16", or the sizes themselves."""
    for variant in (*variants.PUBLISHED, *variants.HYBRIDS):
        expected = {"resnet": None, **variants.fields(variant)}
        if all(fields.get(name) == value for name, value in expected.items()):
            return f"ViT-{variant}"
    stem = "a hybrid" if fields.get("resnet") else "a ViT"
    names = ("width", "depth", "num_heads", "mlp_dim", "patch_size")
    return f"{stem} of {', '.join(f'{name} {fields[name]}' for name in names)}"


def likely_heads(width: int) -> int | None:
    """The heads of the published size of that width; None where there is none."""
    heads = {size["width"]: size["num_heads"] for size in variants.SIZES.values()}
    heads |= {1152: 16, 1536: 16}  # So400m (arXiv:2305.13035), and timm's giantopt
    return heads.get(width)
