"""Loads published weights as the parameters of a given model."""

import re
from collections.abc import Sequence

import flax
import jax
import numpy as np

from vit_jax import models
from vit_jax.checks import check_choice, size_pair
from vit_jax.errors import UserError
from vit_jax.models import VisionTransformer, checks
from vit_jax.paths import CLS, HEAD, MASK_TOKEN, POSEMB, differing_shapes, stack_blocks
from vit_jax.pretrained.adapt import (
    DEPTHS,
    adapt_head,
    adapt_patches,
    adapt_positions,
    adapt_prefix_positions,
    add_blocks,
    check_grid,
    image_size_of,
    position_grid,
)
from vit_jax.pretrained.codebases import architecture
from vit_jax.pretrained.resize import METHODS
from vit_jax.pretrained.weights import Weights, read

# Fields of parts that a model has or lacks.
PARTS = ("reg_tokens", "pre_norm", "norm_layer", "qkv_bias", "qk_norm", "init_values")
PARTS += ("mlp_layer", "scale_mlp")


def load(
    path,
    model,
    image_size: Sequence[int] | int | None = None,
    *,
    grid: Sequence[int] | None = None,
    resize: str = "google",
    resize_patch: bool = False,
    depth: str | None = None,
    seed: int = 0,
    new_head: bool = True,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> dict:
    """Returns the parameters in a file or a run, adapted to a model.

    Position embeddings are resized to the image size. A head for another number of classes is
    replaced by an initial one, with a warning.

    Args:
        path: an .npz or .safetensors file, a folder with config.json and model.safetensors,
            `hf:owner/name`, a run's folder, `<run>/checkpoints/<step>` (or `best`, `latest`), or a
            checkpoint's `params` (the trained parameters) or `ema_params` (their average); local
            or gs://. Or the result of `weights.read`.
        model: the VisionTransformer to load for.
        image_size: of the model's images: an int, (height, width), or (height, width, channels).
            None: the file's.
        grid: (rows, columns) of the file's positions; needed if the file doesn't specify it and
            they are neither a square nor those of `image_size`.
        resize: how positions are resized. "google": linearly, as Google's code does; "torch": as
            DINOv2's code does, bicubically (with register tokens, with antialiasing).
        resize_patch: whether to resize patches of another size (arXiv:2212.08013).
        depth: how to add the blocks of a deeper model. "stack" repeats the file's blocks in order
            (progressive stacking, proceedings.mlr.press/v97/gong19a); "append" puts initial
            blocks after them. None: a deeper model is an error.
        seed: the seed of initial blocks.
        new_head: whether to replace a head that doesn't fit; False: it is an error.
        mean, std: how images will be normalized, to check against the file.

    Returns:
        float32 arrays in the tree of `model.init`.

    Raises:
        UserError: a missing, damaged or unsupported file, the parameters of another model (lists
            all that differ), or NaN or infinity in a parameter.
    """
    if not isinstance(model, VisionTransformer):
        raise UserError(
            f"model is {model!r}; it must be a VisionTransformer, as `models.create` returns"
        )
    weights = path if isinstance(path, Weights) else read(path, model.num_heads)
    check_settings(weights, model, mean, std)
    params = {name: value for name, value in weights.params.items() if name != MASK_TOKEN}
    if resize_patch:
        adapt_patches(params, model)
    channels = weights.channels
    if isinstance(image_size, Sequence) and len(image_size) == 3:
        *image_size, channels = image_size
    if image_size is not None:
        image_size = size_pair("image_size", image_size)
    check_choice("resize (--config.init_from_resize)", resize, METHODS)
    grid, num_rows = position_grid(weights, model, image_size, grid)
    if grid:
        adapt_prefix_positions(params, num_rows, model)
    image_shape = (*(image_size or image_size_of(weights, model, grid)), channels)
    checks.check_image(model, image_shape[:2])
    adapt_positions(params, grid, model.grid(image_shape), model, resize)
    if depth is not None:
        add_blocks(params, depth, model, image_shape, seed)
    expected = architecture.param_shapes(model, image_shape)
    adapt_head(weights.path, params, expected, model, new_head)
    check_shapes(weights.path, params, expected)
    return as_tree(as_float32(weights.path, params), model)


def open_model(
    path,
    image_size: Sequence[int] | int | None = None,
    *,
    num_heads: int | None = None,
    grid: Sequence[int] | None = None,
    resize: str = "google",
    **fields,
) -> tuple[VisionTransformer, dict]:
    """Reads the model that weights belong to, and its parameters.

    `model.apply({"params": params}, images)` returns what the source's `forward` does: logits, or
    the features of a model without a head. `capture=("tokens",)` adds all tokens: timm's
    `forward_features` and transformers' `last_hidden_state`.

    Args:
        path, grid, resize: see `load`.
        image_size: an int, or (height, width); None: the file's.
        num_heads: used if the file doesn't specify it.
        **fields: fields of the model that don't change what it computes, or that the file doesn't
            tell, such as dtype="bfloat16", scan=True.

    Returns:
        The VisionTransformer, and float32 arrays in the tree of `model.init`. If the file has a
        token for masked patches, as DINOv2's do, the arrays have it too: `mask_token` (1, 1, D),
        which the model ignores, and `pretrained.save` writes back.

    Raises:
        UserError: as `load`; a model that has parts that this code doesn't have.
    """
    weights = path if isinstance(path, Weights) else read(path, num_heads)
    weights.check_num_heads(num_heads)
    model = models.create("B/16", **{**weights.model_fields, **fields})
    if image_size is None:
        image_size = image_size_of(weights, model, grid)
    image_size = size_pair("image_size", image_size)
    params = load(weights, model, image_size, grid=grid, resize=resize, new_head=False)
    return model, with_mask_token(params, weights, model)


def with_mask_token(params: dict, weights: Weights, model) -> dict:
    """Adds the file's token for masked patches, if there is one, to the parameters of a model."""
    if MASK_TOKEN not in weights.params:
        return params
    token = {MASK_TOKEN: weights.params[MASK_TOKEN]}
    check_shapes(weights.path, token, {MASK_TOKEN: (1, 1, model.width)})
    return params | as_float32(weights.path, token)


def from_config(
    config, model, image_shape: Sequence[int], new_head: bool = True, weights: Weights | None = None
) -> dict:
    """Loads the weights that `config.init_from` and the fields beside it describe.

    Args:
        config: a run's configuration.
        model, new_head: see `load`.
        image_shape: (height, width, channels).
        weights: the weights, if they were read already.

    Returns:
        As `load`; for training on masked patches, with the weights' own token for them, if any.
    """
    weights = weights or read(config.init_from, model.num_heads)
    params = load(
        weights,
        model,
        image_shape,
        grid=config.init_from_grid,
        resize=config.get("init_from_resize", "google"),  # older runs have no such field
        resize_patch=config.init_from_patch == "resize",
        depth=config.init_from_depth,
        seed=config.seed,
        new_head=new_head,
        mean=config.augment.mean,
        std=config.augment.std,
    )
    is_masked = not models.predicts_classes(config)
    return with_mask_token(params, weights, model) if is_masked else params


def check(config) -> None:
    """Raises UserError for impossible values of the fields beside `config.init_from`.

    Without it, nothing would use them.
    """
    if config.init_from_grid is not None:
        check_grid("config.init_from_grid", config.init_from_grid)
    check_choice("config.init_from_resize", config.get("init_from_resize", "google"), METHODS)
    check_choice("config.init_from_patch", config.init_from_patch, (None, "resize"))
    check_choice("config.init_from_depth", config.init_from_depth, (None, *DEPTHS))
    for name in ("init_from_grid", "init_from_patch", "init_from_depth"):
        if config[name] is not None and not config.init_from:
            raise UserError(f"config.{name} is {config[name]!r}, which needs config.init_from")


def check_settings(weights: Weights, model, mean=None, std=None) -> None:
    """Raises UserError if a model would compute something else with the file's parameters.

    Lists all that differs in one message, with how to set it in Python and as flags.
    """
    stored = {**parts(weights, model), **weights.fields}
    differing = [  # (group of the configuration, field, the file's value, the model's value)
        ("model", field, value, getattr(model, field))
        for field, value in stored.items()
        # The positions themselves are compared, and adapted, whatever their kind and rows.
        if value != getattr(model, field)
        and field not in ("no_embed_class", "embed_reg")
        and not (field == "posemb" and POSEMB in weights.params)
    ]
    for field, stored, given in (("mean", weights.mean, mean), ("std", weights.std, std)):
        if stored is not None and given is not None and not same_per_channel(stored, given):
            differing.append(("augment", field, shortened(stored), shortened(tuple(given))))
    if differing:
        theirs = ", ".join(f"{field} {stored!r}" for _, field, stored, _ in differing)
        ours = ", ".join(repr(value) for *_, value in differing)
        arguments = ", ".join(f"{field}={stored!r}" for _, field, stored, _ in differing)
        flags = " ".join(
            f'--config.{group}.{field}="{stored}"'
            if isinstance(stored, tuple)
            else f"--config.{group}.{field}={stored}"
            for group, field, stored, _ in differing
        )
        raise UserError(
            f"{weights.path} was trained with {theirs}, not {ours}: set {arguments} ({flags})"
        )


def parts(weights: Weights, model) -> dict:
    """Returns the fields that show in the file's parameters, and aren't sizes.

    A LayerScale has the model's initial value, which doesn't matter.
    """
    fields = {field: weights.model_fields[field] for field in PARTS}
    if fields["init_values"] is not None and model.init_values is not None:
        fields["init_values"] = model.init_values
    has_class_token = CLS in weights.params
    if weights.model_fields["pool"] == model.pool and has_class_token != model.has_class_token:
        fields["class_token"] = has_class_token
    return fields


def same_per_channel(a, b) -> bool:
    """Whether two tuples, each of one number or one per channel, are the same for every channel."""
    length = max(len(a), len(b))
    return len(a) in (1, length) and len(b) in (1, length) and np.allclose(a, b, atol=1e-6)


def shortened(values: tuple) -> tuple:
    """Returns one number instead of the same number for every channel."""
    return values[:1] if len(set(values)) == 1 else values


MAX_LISTED = 8  # differing parameters in a message


def check_shapes(path: str, params, expected: architecture.Shapes) -> None:
    """Raises UserError listing each parameter that is missing, extra or of another shape."""
    shapes = {name: value.shape for name, value in params.items()}
    differing = list(differing_shapes(shapes, expected))
    if not differing:
        return
    stored, wanted = (  # without the head, which may be a new one already
        architecture.infer_fields({n: s for n, s in part.items() if not n.startswith(f"{HEAD}/")})
        for part in (shapes, expected)
    )
    other = {n: v for n, v in stored.items() if v != wanted.get(n) and n != "num_classes"}
    hints = []
    if other:
        names = architecture.describe(stored), architecture.describe(wanted)
        if names[0] != names[1]:
            hints.append(f"it looks like {names[0]}, and this model is {names[1]}")
        hints.append(f"it has {', '.join(f'{name} {value!r}' for name, value in other.items())}")
    if other.keys() == {"depth"} and other["depth"] < wanted["depth"]:
        hints.append(
            "depth='stack' (--config.init_from_depth=stack) repeats the blocks it has, 'append' "
            "adds initial ones"
        )
    if other.keys() == {"patch_size"}:
        hints.append("resize_patch=True (--config.init_from_patch=resize) resizes its patches")
    channels = [architecture.num_channels(s) for s in (shapes, expected) if stored and wanted]
    if len(set(channels)) > 1:
        hints.append(
            f"it is for images of {channels[0]} channels, not {channels[1]}: set "
            f"config.dataset.channels to {channels[0]}"
        )
    listed = group_by_block(differing)
    hints += listed[:MAX_LISTED]
    if len(listed) > MAX_LISTED:
        hints.append(f"and {len(listed) - MAX_LISTED} more parameters")
    raise UserError(f"{path} holds another model: {'; '.join(hints)}")


def group_by_block(differing: list[tuple]) -> list[str]:
    """Describes differing shapes, the same in several blocks as one: "encoderblock_{0,1}/..."."""
    blocks = {}
    for name, stored, expected in differing:
        match = re.search(r"encoderblock_(\d+)", name)
        pattern = re.sub(r"encoderblock_\d+", "encoderblock_{}", name)
        blocks.setdefault((pattern, stored, expected), []).append(match[1] if match else "")
    lines = []
    for (pattern, stored, expected), indices in blocks.items():
        numbers = ",".join(sorted(indices, key=int)) if indices[0] else ""
        numbers = f"{{{numbers}}}" if len(indices) > 1 else numbers
        name = pattern.replace("{}", numbers)
        lines.append(f"{name} is {stored} in the file and {expected} in the model")
    return lines


def as_float32(path: str, params) -> dict[str, np.ndarray]:
    """Returns parameters as float32; raises UserError if there is NaN or infinity in one."""
    with np.errstate(over="ignore"):  # `check_finite` reports it
        params = {name: np.asarray(value, np.float32) for name, value in params.items()}
    check_finite(path, params)
    return params


def check_finite(path: str, params) -> None:
    """Raises UserError naming the first parameter with NaN or infinity."""
    for name, value in params.items():
        if not np.isfinite(value).all():
            num_bad = value.size - np.count_nonzero(np.isfinite(value))
            raise UserError(
                f"{path}: {name} has NaN or infinity in {num_bad:,} of its {value.size:,} values: "
                "use other weights, or an earlier checkpoint"
            )


def as_tree(params, model) -> dict:
    """Returns parameters in the tree of `model.init`."""
    tree = flax.traverse_util.unflatten_dict(params, sep="/")
    return jax.tree.map(np.asarray, stack_blocks(tree)) if model.scan else tree
