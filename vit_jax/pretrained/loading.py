"""Loads published weights as the parameters of a given model."""

import logging
import math
import numbers
import re
from collections.abc import Sequence

import flax
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax import models
from vit_jax.checks import check_choice, size_pair
from vit_jax.errors import UserError
from vit_jax.models import VisionTransformer, checks, posemb
from vit_jax.paths import (
    CLS,
    EMBEDDING,
    HEAD,
    POSEMB,
    PRE_LOGITS,
    REG,
    differing_shapes,
    in_block,
    num_blocks,
    stack_blocks,
)
from vit_jax.pretrained import architecture
from vit_jax.pretrained.resize import METHODS, resize_patches, resize_positions
from vit_jax.pretrained.weights import Weights, num_prefix_rows, read

logger = logging.getLogger("vit_jax")

KERNEL = f"{EMBEDDING}/kernel"
HEAD_KERNEL, HEAD_BIAS = f"{HEAD}/kernel", f"{HEAD}/bias"
DEPTHS = ("stack", "append")
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
    params = dict(weights.params)
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
    with np.errstate(over="ignore"):  # `check_finite` reports it
        params = {name: np.asarray(value, np.float32) for name, value in params.items()}
    check_finite(weights.path, params)
    return as_tree(params, model)


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
        The VisionTransformer, and float32 arrays in the tree of `model.init`.

    Raises:
        UserError: as `load`; a model that has parts that this code doesn't have.
    """
    weights = path if isinstance(path, Weights) else read(path, num_heads)
    weights.check_num_heads(num_heads)
    model = models.create("B/16", **{**weights.model_fields, **fields})
    if image_size is None:
        image_size = image_size_of(weights, model, grid)
    image_size = size_pair("image_size", image_size)
    return model, load(weights, model, image_size, grid=grid, resize=resize, new_head=False)


def from_config(
    config, model, image_shape: Sequence[int], new_head: bool = True, weights: Weights | None = None
) -> dict:
    """Loads the weights that `config.init_from` and the fields beside it describe.

    Args:
        config: a run's configuration.
        model, new_head: see `load`.
        image_shape: (height, width, channels).
        weights: the weights, if they were read already.
    """
    return load(
        weights or config.init_from,
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


def check_grid(field: str, grid) -> None:
    """Raises UserError if `grid` isn't (rows, columns), both above 0."""
    is_pair = isinstance(grid, Sequence) and len(grid) == 2
    if not is_pair or not all(isinstance(n, numbers.Integral) and n > 0 for n in grid):
        raise UserError(f"{field} is {grid!r}; it must be (rows, columns), both above 0")


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


def position_grid(weights: Weights, model, image_size, grid) -> tuple[tuple[int, int] | None, int]:
    """Returns (rows, columns) of the file's positions, and how many more come before them.

    Args:
        weights: the file's contents.
        model: the model to load for.
        image_size: (height, width) of the model's images, or None.
        grid: (rows, columns), if the caller knows them. Otherwise they follow from the file's
            image size, from a square number of positions, or from `image_size`.

    Returns:
        The grid, None if the file has no positions; and the number of positions of the class token
        and the register tokens.

    Raises:
        UserError: a grid with another number of positions, or several or no possible grids.
    """
    if POSEMB not in weights.params:
        return None, 0
    length = weights.params[POSEMB].shape[1]
    prefix_rows = num_prefix_rows(weights)
    if grid is not None:
        check_grid("grid (--config.init_from_grid)", grid)
        if length - math.prod(grid) not in prefix_rows:
            raise UserError(
                f"grid (--config.init_from_grid) is {tuple(grid)}; it must have the "
                f"{' or '.join(str(length - n) for n in prefix_rows)} positions of {weights.path}"
            )
        return tuple(grid), length - math.prod(grid)
    if weights.image_size:
        stored_model = model.clone(patch_size=weights.params[KERNEL].shape[:2])
        grid = stored_model.grid(weights.image_size)
        if length - math.prod(grid) not in prefix_rows:
            rows, columns = grid
            height, width = weights.image_size
            raise UserError(
                f"{weights.path} has {length} positions, but says that its images are of "
                f"{height}x{width} pixels, which are {rows}x{columns} patches: give "
                'grid=(rows, columns) (--config.init_from_grid="(rows, columns)"; to convert, '
                "--grid rows columns)"
            )
        return grid, length - math.prod(grid)
    num_positions = length - prefix_rows[0]
    square = (math.isqrt(num_positions),) * 2
    candidates = {square, model.grid(image_size) if image_size else square}
    candidates = sorted(grid for grid in candidates if math.prod(grid) == num_positions)
    if len(candidates) != 1:
        possible = " or ".join(f"{rows}x{columns}" for rows, columns in candidates)
        raise UserError(
            f"{weights.path} has {num_positions} positions of patches and doesn't specify their "
            f"grid, which is {possible or 'no square'}: give grid=(rows, columns) "
            '(--config.init_from_grid="(rows, columns)"; to convert, --grid rows columns)'
        )
    return candidates[0], prefix_rows[0]


def image_size_of(weights: Weights, model, grid=None) -> tuple[int, int]:
    """Returns (height, width) of the images that a file is for, with the model's patch size.

    Args:
        grid: (rows, columns) of the file's positions, if the file doesn't specify it.

    Raises:
        UserError: the file tells neither its image size nor its grid.
    """
    grid, _ = position_grid(weights, model, None, grid)
    if grid:
        return tuple(n * pixels for n, pixels in zip(grid, model.token_pixels, strict=True))
    if weights.image_size is None:
        raise UserError(
            f"{weights.path} doesn't tell the size of its images: give image_size "
            "(--config.image_size)"
        )
    return weights.image_size


def adapt_patches(params, model) -> None:
    """Resizes the patch kernel to the model's patch size, in place."""
    kernel = params[KERNEL]
    if kernel.shape[:2] != model.patch_shape:
        logger.info(f"Resizing patches of {kernel.shape[:2]} pixels to {model.patch_shape}")
        params[KERNEL] = resize_patches(kernel, model.patch_shape)


def adapt_prefix_positions(params, num_rows: int, model) -> None:
    """Gives the tokens before the patches as many positions as in the model, in place.

    Missing ones are zeros; those that the model lacks are added to the tokens themselves.

    Args:
        num_rows: how many positions come before the patches'.
    """
    tokens = [name for name in (CLS, REG) if name in params]
    num_kept = model.num_prefix_positions
    num_prefix = sum(params[name].shape[1] for name in tokens)
    # A fixed table, or another model: reported later.
    if num_rows == num_kept or num_prefix != model.num_prefix_tokens:
        return
    rows, rest = np.split(params[POSEMB], [num_rows], axis=1)
    rows = np.pad(rows, ((0, 0), (0, num_prefix - num_rows), (0, 0)))
    start = 0
    for name in tokens:
        stop = start + params[name].shape[1]
        if start >= num_kept:
            params[name] = params[name] + rows[:, start:stop]
        start = stop
    params[POSEMB] = np.concatenate([rows[:, :num_kept], rest], axis=1)


def adapt_positions(
    params, old: tuple[int, int] | None, new: tuple[int, int], model, method: str
) -> None:
    """Resizes learned positions to a new grid, in place.

    If the model computes its positions, removes a table of the same values.
    """
    if old is None:
        return
    positions, num_prefix = params[POSEMB], params[POSEMB].shape[1] - math.prod(old)
    if model.posemb == "learned":
        if old != new:
            logger.info(f"Resizing positions of a grid of {old} to {new}")
        params[POSEMB] = resize_positions(
            positions, old, new, num_prefix, method, has_registers=bool(model.reg_tokens)
        )
    else:
        table = posemb.table(model.posemb, *old, model.width, num_prefix)
        if table.shape == positions.shape and np.allclose(table, positions, atol=1e-5):
            del params[POSEMB]


def add_blocks(params, depth: str, model, image_shape, seed: int) -> None:
    """Adds the blocks that a deeper model needs, in place; see `load`."""
    check_choice("depth (--config.init_from_depth)", depth, DEPTHS)
    num_stored = num_blocks(params)
    if num_stored >= model.depth:
        return
    if depth == "append":
        params |= initial_blocks(model, num_stored, image_shape, seed)
        origin = f"initial, with seed {seed}"
    else:
        for i in range(num_stored, model.depth):
            copied, new = in_block(i % num_stored, ""), in_block(i, "")
            for name in [name for name in params if name.startswith(copied)]:
                params[new + name.removeprefix(copied)] = params[name]
        origin = f"copies of the {num_stored} blocks before them"
    logger.info(f"Blocks {num_stored} to {model.depth - 1} are {origin}")


def initial_blocks(model, first: int, image_shape, seed: int) -> dict[str, np.ndarray]:
    """Returns the initial parameters of the blocks from `first` on, in a run with this seed."""
    unstacked = model.clone(scan=False)

    @jax.jit  # computes only what is returned
    def init():
        params = unstacked.init(jax.random.key(seed), jnp.zeros((1, *image_shape)))["params"]
        flat = flax.traverse_util.flatten_dict(params, sep="/")
        new = tuple(in_block(i, "") for i in range(first, model.depth))
        return {name: value for name, value in flat.items() if name.startswith(new)}

    return jax.device_get(init())


def adapt_head(path: str, params, expected: architecture.Shapes, model, new_head: bool) -> None:
    """Removes head parameters that the model lacks, and replaces a head for other classes.

    Raises:
        UserError: a head that doesn't fit, and `new_head` is False.
    """
    num_stored = params[HEAD_BIAS].shape[0] if HEAD_BIAS in params else 0
    stored = f"a head for {num_stored} classes" if num_stored else "no head"
    extra = [
        name
        for name in params
        if name.startswith((f"{HEAD}/", f"{PRE_LOGITS}/")) and name not in expected
    ]
    if f"{PRE_LOGITS}/kernel" in extra:
        stored += " after a representation layer"
    for name in extra:
        del params[name]
    fits = not extra and all(
        name in params and params[name].shape == expected.get(name)
        for name in (HEAD_KERNEL, HEAD_BIAS)
    )
    # A head for as many classes that doesn't fit is of another model, as `check_shapes` reports.
    is_other_head = extra or num_stored != model.num_classes
    if HEAD_KERNEL in expected and not fits and is_other_head:
        if not new_head:
            raise UserError(f"{path} has {stored}; the model needs one for {model.num_classes}")
        params[HEAD_KERNEL] = np.zeros(expected[HEAD_KERNEL], np.float32)
        params[HEAD_BIAS] = np.full(expected[HEAD_BIAS], model.head_bias_init, np.float32)
        logger.warning(f"{path} has {stored}; the new head for {model.num_classes} starts at zero")


MAX_LISTED = 8  # differing parameters in a message


def check_shapes(path: str, params, expected: architecture.Shapes) -> None:
    """Raises UserError listing each parameter that is missing, extra or of another shape."""
    shapes = {name: value.shape for name, value in params.items()}
    differing = list(differing_shapes(shapes, expected))
    if not differing:
        return
    stored, wanted = (architecture.infer_fields(s) for s in (shapes, expected))
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
