"""Google's code and big_vision: reads files of all ages, and writes those of Google's code.

Parameters are flat dicts, name -> array. This code's have the names in `vit_jax/paths.py`, with
unstacked blocks.
"""

import re

from etils import epath

from vit_jax.errors import UserError
from vit_jax.paths import (
    ATTENTION,
    MAP_HEAD,
    MLP,
    NORM_0,
    NORM_1,
    POSEMB,
    in_block,
    is_known,
    is_stacked,
)
from vit_jax.pretrained.codebases.architecture import recognize_other_model
from vit_jax.pretrained.codebases.files import write_arrays
from vit_jax.pretrained.codebases.state_dict import Flat, check_all_named
from vit_jax.pretrained.codebases.writing import ANY, Export

# What both compute, and how they normalize images.
FIELDS = dict(gelu="tanh", layer_norm_eps=1e-6, pool_norm="before")
MEAN = STD = (0.5,)

# The models that Google's code has; see `writing.unrepresentable`.
REPRESENTABLE = dict(
    gelu=("tanh",),
    layer_norm_eps=(1e-6,),
    pool=("cls", "gap", "none"),
    pool_norm=("before",),
    norm=("pre",),
    representation_size=ANY,
    resnet=ANY,
)

# Before Linen, Flax numbered all submodules of a block in one sequence; the files that Google
# published have these names.
OLD_NUMBERING = {
    "LayerNorm_2": NORM_1,
    "MlpBlock_3": MLP,
    "MultiHeadDotProductAttention_1": ATTENTION,
}

# big_vision's oldest MAP heads have no module of their own.
MAP_HEAD_PARTS = ("probe", NORM_0, MLP, ATTENTION)

GROUP_NORM = re.compile(r"(^|/)gn\w*/")


def read(path: str, stored: Flat) -> dict:
    """Converts the arrays of a file of Google's code or big_vision to fields of `Weights`.

    Raises:
        UserError: another model.
    """
    if model := recognize_other_model(stored):
        raise UserError(f"{path} can't be read: it looks like {model}")
    # big_vision's positions are at the top level. It adds them before it prepends the class token.
    is_google = any(name.endswith(POSEMB) for name in stored)
    return dict(
        params=from_flax(stored),
        prefix_rows=(1,) if is_google else (0, 1),
        fields=FIELDS,
        mean=MEAN,
        std=STD,
    )


def from_flax(stored: Flat) -> Flat:
    """Converts parameters of Google's code or big_vision, old and new.

    Handles a prefix, with other arrays beside the parameters; the old numbering; group norms of
    shape (1, 1, 1, C); positions at the top level; stacked blocks; and MAP heads without a module.
    """
    for prefix in ("opt/target/", "params/"):
        if any(name.startswith(prefix) for name in stored):
            stored = {n.removeprefix(prefix): v for n, v in stored.items() if n.startswith(prefix)}
    if any("/LayerNorm_2/" in name for name in stored):
        stored = {rename_parts(name, OLD_NUMBERING): value for name, value in stored.items()}
    params = {}
    for name, value in stored.items():
        if GROUP_NORM.search(name):
            value = value.reshape(-1)
        if name == "pos_embedding":
            name = POSEMB
        if name.split("/")[0] in MAP_HEAD_PARTS:
            name = f"{MAP_HEAD}/{name}"
        if is_stacked(name):
            _, _, parameter = name.partition("encoderblock/")
            params |= {in_block(i, parameter): layer for i, layer in enumerate(value)}
        else:
            params[name] = value
    return params


def to_google(params: Flat) -> Flat:
    """Converts to the names and shapes of the files under gs://vit_models.

    Raises:
        UserError: a parameter that isn't in `vit_jax/paths.py`, and so not in Google's code.
    """
    check_all_named([name for name in params if not is_known(name)], "Google's code")
    old_names = {new: old for old, new in OLD_NUMBERING.items()}
    stored = {}
    for name, value in params.items():
        if "/encoderblock_" in name:
            name = rename_parts(name, old_names)
        stored[name] = value.reshape(1, 1, 1, -1) if GROUP_NORM.search(name) else value
    return stored


def rename_parts(name: str, new_names: dict[str, str]) -> str:
    """Replaces the parts of a name that are keys of `new_names`."""
    return re.sub("|".join(new_names), lambda match: new_names[match[0]], name)


def representable(model, approximate: bool) -> dict:
    """Returns the values of the model's fields that Google's code has."""
    return REPRESENTABLE


def check_normalization(mean, std) -> None:
    """Raises UserError for another normalization than that of Google's code."""
    if set(mean + std) != {0.5}:
        raise UserError(
            f"Google's code normalizes images with mean and std 0.5, but these are {mean} and "
            f"{std}: approximate=True (--approximate) writes the parameters anyway"
        )


def keeps_mask_token(model) -> bool:
    """Whether a token for masked patches has a place in Google's model."""
    return False


def writes_file(path: epath.Path) -> bool:
    """Whether a path is a file to write, rather than a folder."""
    return True


def write(path: epath.Path, export: Export) -> None:
    """Writes an .npz file."""
    if path.suffix != ".npz":
        raise UserError(f"{path}: a file in the format 'google' must have a name ending in .npz")
    write_arrays(path, to_google(export.params))
