"""Published weights as the parameters of a given model."""

import logging
import math
import re
from collections.abc import Sequence

import flax
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.checks import check_choice
from vit_jax.errors import UserError
from vit_jax.models import checks, posemb
from vit_jax.models.stacking import stack_blocks
from vit_jax.paths import POSEMB, differing_shapes, num_blocks
from vit_jax.pretrained import architecture, resize
from vit_jax.pretrained.weights import Weights, read

logger = logging.getLogger("vit_jax")

HEAD = ("head/kernel", "head/bias")
DEPTHS = ("stack", "append")


def load(
    path,
    model,
    image_size: Sequence[int] | int | None = None,
    *,
    grid: Sequence[int] | None = None,
    resize_patch: bool = False,
    depth: str | None = None,
    seed: int = 0,
    new_head: bool = True,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> dict:
    """The parameters of a published file for this model.

    The position grid is resized to that of the images; a head for another number of classes is
    left at its initial value, and said.

    Args:
        path: a `.npz` or `.safetensors` file, a folder with `config.json` and `model.safetensors`,
            `hf:owner/name`, a run's folder, `<run>/checkpoints/<step>`, or of that the raw
            `.../params` or their average `.../ema_params`; local or gs://. Or what `weights.read`
            gave of one.
        model: the VisionTransformer they are for.
        image_size: (height, width) of its images, and their channels, where they are to be those;
            or an edge; None: those of the file.
        grid: (rows, columns) of the file's positions, where they are no square and the file
            doesn't tell.
        resize_patch: whether patches of another size are resized (arXiv:2212.08013).
        depth: how a deeper model is filled: "stack" repeats the blocks there are in their order
            (progressive stacking, proceedings.mlr.press/v97/gong19a), "append" leaves those after
            them at their initial values, which `seed` decides; None: it isn't.
        new_head: whether a head that doesn't fit starts anew; False: it is refused.
        mean, std: of the normalisation of the images, to be checked against the file's.

    Returns:
        float32 arrays in the tree that `model.init` makes.

    Raises:
        UserError: no such file, one that is damaged or of another kind, or parameters of another
            model; all that differ are listed.
    """
    weights = path if isinstance(path, Weights) else read(path, model.num_heads)
    check_settings(weights, model, mean, std)
    if isinstance(image_size, int):
        image_size = (image_size, image_size)
    flat = dict(weights.params)
    kernel = flat["embedding/kernel"]
    if resize_patch and kernel.shape[:2] != model.patch_shape:
        logger.info(f"Patches of {kernel.shape[:2]} pixels are resized to {model.patch_shape}")
        flat["embedding/kernel"] = resize.resize_patches(kernel, model.patch_shape)
    old_grid = grid_of(weights, model, image_size, grid)
    height, width, *channels = image_size or image_size_of(weights, model, old_grid)
    image_shape = (height, width, *(channels or (weights.channels,)))
    checks.check_image(model, image_shape[:2])
    expected = architecture.parameters(model, image_shape)
    fit_positions(flat, old_grid, model.grid(image_shape), model)
    if depth:
        fit_depth(flat, depth, model, image_shape, seed)
    fit_head(weights.path, flat, expected, model, new_head)
    check_shapes(weights, flat, expected, model)
    flat = {name: np.asarray(value, np.float32) for name, value in flat.items()}
    params = flax.traverse_util.unflatten_dict(flat, sep="/")
    return jax.tree.map(np.asarray, stack_blocks(params)) if model.scan else params


def from_config(
    config, model, image_shape: Sequence[int], new_head: bool = True, weights: Weights | None = None
) -> dict:
    """The weights that `config.init_from` names, or that were read, as the fields beside it say."""
    return load(
        weights or config.init_from,
        model,
        image_shape,
        grid=config.init_from_grid,
        resize_patch=config.init_from_patch == "resize",
        depth=config.init_from_depth,
        seed=config.seed,
        new_head=new_head,
        mean=config.augment.mean,
        std=config.augment.std,
    )


def check(config) -> None:
    """Raises UserError for fields beside `config.init_from` that can't work."""
    grid = config.init_from_grid
    if grid is not None and not (isinstance(grid, (tuple, list)) and len(grid) == 2):
        raise UserError(f"config.init_from_grid is {grid!r}; it must be (rows, columns)")
    check_choice("config.init_from_patch", config.init_from_patch, (None, "resize"))
    check_choice("config.init_from_depth", config.init_from_depth, (None, *DEPTHS))


def check_settings(weights: Weights, model, mean=None, std=None) -> None:
    """Raises UserError where the file's model computes something else with the same parameters.

    All that differs is in one message, with the overrides that mend it.
    """
    settings = [(f"model.{n}", v, getattr(model, n)) for n, v in weights.fields.items()]
    # A table of positions may have been learned; `fit_positions` looks at it.
    settings = [s for s in settings if s[0] != "model.posemb" or POSEMB not in weights.params]
    differing = [(name, there, here) for name, there, here in settings if there != here]
    for name, there, here in (("mean", weights.mean, mean), ("std", weights.std, std)):
        if there is not None and here is not None and not all_equal(there, here):
            differing.append((f"augment.{name}", short(there), short(tuple(here))))
    if differing:
        there = ", ".join(f"{name} {value!r}" for name, value, _ in differing)
        here = ", ".join(repr(value) for _, _, value in differing)
        mend = " ".join(
            f'--config.{name}="{value}"' if isinstance(value, tuple) else f"--config.{name}={value}"
            for name, value, _ in differing
        )
        raise UserError(f"{weights.path} was trained with {there}, and here are {here}: set {mend}")


def all_equal(a, b) -> bool:
    """Whether two tuples, of one number or one a channel, say the same."""
    length = max(len(a), len(b))
    return len(a) in (1, length) and len(b) in (1, length) and np.allclose(a, b, atol=1e-6)


def short(values: tuple) -> tuple:
    """One number where all channels have the same."""
    return values[:1] if len(set(values)) == 1 else values


def grid_of(weights: Weights, model, image_size, grid) -> tuple[int, int] | None:
    """(rows, columns) of the file's positions; None where it has none.

    Told by the caller, by the size of the file's images, or by a square number of positions.
    """
    if POSEMB not in weights.params:
        return None
    num_positions = weights.params[POSEMB].shape[1] - ("cls" in weights.params)
    if grid is not None:
        if math.prod(grid) != num_positions:
            raise UserError(
                f"{weights.path} has {num_positions} positions, which are no grid of {tuple(grid)}"
            )
        return tuple(grid)
    if weights.image_size:
        there = model.clone(patch_size=weights.params["embedding/kernel"].shape[:2])
        grid = there.grid(weights.image_size)
        if math.prod(grid) == num_positions:
            return grid
    square = (math.isqrt(num_positions),) * 2
    here = model.grid(image_size) if image_size else square
    candidates = {g for g in (square, here) if math.prod(g) == num_positions}
    if len(candidates) != 1:
        raise UserError(
            f"{weights.path} doesn't tell which grid its {num_positions} positions are, and there "
            f"are {' and '.join(f'{h}x{w}' for h, w in sorted(candidates)) or 'no square ones'}: "
            "say it with --config.init_from_grid='(rows, columns)' (grid= in Python)"
        )
    return candidates.pop()


def image_size_of(weights: Weights, model, grid=None) -> tuple[int, int]:
    """(height, width) of the images the file is for, with the patches of the model."""
    grid = grid or grid_of(weights, model, None, None)
    if grid:
        return tuple(n * pixels for n, pixels in zip(grid, model.token_pixels, strict=True))
    if weights.image_size is None:
        raise UserError(
            f"{weights.path} has no positions to tell its images' size from: give image_size"
        )
    return weights.image_size


def fit_positions(flat, old: tuple[int, int] | None, new: tuple[int, int], model) -> None:
    """Resizes the positions to the grid; a fixed table that the model computes is left out."""
    if old is None:
        return
    positions = flat[POSEMB]
    if model.posemb == "learned":
        if old != new:
            logger.info(f"Positions of a grid of {old} are resized to {new}")
        flat[POSEMB] = resize.resize_positions(positions, old, new, "cls" in flat)
    else:
        table = posemb.table(model.posemb, *old, model.width, "cls" in flat)
        if table.shape == positions.shape and np.allclose(table, positions, atol=1e-5):
            del flat[POSEMB]


def fit_depth(flat, how: str, model, image_shape, seed: int) -> None:
    """Fills the blocks of a deeper model."""
    if how not in DEPTHS:
        raise UserError(f"config.init_from_depth is {how!r}; it can be 'stack', 'append'")
    there = num_blocks(flat)
    if there >= model.depth:
        return
    if how == "append":
        flat.update(initial_blocks(model, there, image_shape, seed))
    else:
        names = [name for name in flat if "/encoderblock_" in name]
        for i in range(there, model.depth):
            copied = f"/encoderblock_{i % there}/"
            for name in names:
                if copied in name:
                    flat[name.replace(copied, f"/encoderblock_{i}/")] = flat[name]
    logger.info(f"Blocks {there} to {model.depth - 1} are {how}ed to the {there} blocks there are")


def initial_blocks(model, first: int, image_shape, seed: int) -> dict[str, np.ndarray]:
    """The parameters of the blocks from `first` on as a run with this seed has them at first."""
    plain = model.clone(scan=False)

    @jax.jit  # leaves out what isn't asked for
    def init():
        params = plain.init(jax.random.key(seed), jnp.zeros((1, *image_shape)))["params"]
        blocks = {
            f"encoderblock_{i}": params["Transformer"][f"encoderblock_{i}"]
            for i in range(first, model.depth)
        }
        return flax.traverse_util.flatten_dict({"Transformer": blocks}, sep="/")

    return jax.device_get(init())


def fit_head(path, flat, expected, model, new_head: bool) -> None:
    """Leaves out what the model lacks of the file's head; one for other classes starts anew."""
    there = flat["head/bias"].shape[0] if "head/bias" in flat else 0
    has = f"a head for {there} classes" if there else "no head"
    dropped = [n for n in flat if n.startswith(("head/", "pre_logits/")) and n not in expected]
    if "pre_logits/kernel" in dropped:
        has += " after a representation layer"
    for name in dropped:
        del flat[name]
    fits = not dropped and all(
        name in flat and flat[name].shape == expected.get(name) for name in HEAD
    )
    if HEAD[0] in expected and not fits:
        if not new_head:
            raise UserError(f"{path} has {has}, where this model has {model.num_classes}")
        kernel, bias = HEAD
        flat[kernel] = np.zeros(expected[kernel], np.float32)
        flat[bias] = np.full(expected[bias], model.head_bias_init, np.float32)
        logger.info(f"{path} has {has}; one for {model.num_classes} classes starts at zero")


def check_shapes(weights: Weights, flat, expected, model) -> None:
    """Raises UserError listing each parameter that is missing, extra or of another shape."""
    found = {name: value.shape for name, value in flat.items()}
    differing = list(differing_shapes(found, expected))
    if not differing:
        return
    there, here = architecture.fields(found), architecture.fields(expected)
    hints = []
    if other := {n: v for n, v in there.items() if v != here.get(n) and n != "num_classes"}:
        names = architecture.describe(there), architecture.describe(here)
        what = ", ".join(f"{name} {value!r}" for name, value in other.items())
        if names[0] != names[1]:
            hints.append(f"it looks like {names[0]}, the model here is {names[1]}")
        hints.append(f"it has {what}")
        if other.keys() == {"depth"} and other["depth"] < model.depth:
            hints.append("--config.init_from_depth=stack (or append) fills the blocks it lacks")
        if other.keys() == {"patch_size"}:
            hints.append("--config.init_from_patch=resize resizes its patches")
    hints += by_block(differing)
    raise UserError(f"{weights.path} is of another model: {'; '.join(hints)}")


def by_block(differing: list[tuple]) -> list[str]:
    """What differs, alike parameters of several blocks as one: "encoderblock_{0,1,2}/..."."""
    blocks = {}
    for name, there, here in differing:
        block = re.search(r"encoderblock_(\d+)", name)
        name = re.sub(r"encoderblock_\d+", "encoderblock_{}", name)
        blocks.setdefault((name, there, here), []).append(block[1] if block else "")
    lines = []
    for (name, there, here), numbers in blocks.items():
        some = ",".join(sorted(numbers, key=int)) if numbers[0] else ""
        some = f"{{{some}}}" if len(numbers) > 1 else some
        lines.append(f"{name.replace('{}', some)} {there} there, {here} here")
    return lines
