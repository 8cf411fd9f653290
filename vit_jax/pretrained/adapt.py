"""Adapts a file's parameters to a model: positions, patches, depth and head."""

import logging
import math
import numbers
from collections.abc import Sequence

import flax
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.checks import check_choice
from vit_jax.errors import UserError
from vit_jax.models import posemb
from vit_jax.paths import CLS, EMBEDDING, HEAD, POSEMB, PRE_LOGITS, REG, in_block, num_blocks
from vit_jax.pretrained.codebases.architecture import Shapes
from vit_jax.pretrained.resize import resize_patches, resize_positions
from vit_jax.pretrained.weights import Weights, num_prefix_rows

logger = logging.getLogger("vit_jax")

KERNEL = f"{EMBEDDING}/kernel"
HEAD_KERNEL, HEAD_BIAS = f"{HEAD}/kernel", f"{HEAD}/bias"
DEPTHS = ("stack", "append")


def check_grid(field: str, grid) -> None:
    """Raises UserError if `grid` isn't (rows, columns), both above 0."""
    is_pair = isinstance(grid, Sequence) and len(grid) == 2
    if not is_pair or not all(isinstance(n, numbers.Integral) and n > 0 for n in grid):
        raise UserError(f"{field} is {grid!r}; it must be (rows, columns), both above 0")


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


def adapt_head(path: str, params, expected: Shapes, model, new_head: bool) -> None:
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
