"""The optimizer: clipping, update rule, weight decay, and learning rates per parameter.

To add an update rule, write a function of `config.optimizer` that returns an optax transformation
of gradients into directions, and give it a row in OPTIMIZERS. The function chains `weight_decay`
where the rule wants it; the learning rate and the minus sign are applied afterward. A new field
gets its default in configs/common.py and its valid values in RANGES; if it isn't a number, add it
to FIELDS and to `check`. The optimizer's state is sharded like the parameters.
"""

import math
import operator
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vit_jax import checks
from vit_jax.errors import UserError
from vit_jax.paths import (
    HEAD,
    OUT,
    PATCH_HEAD,
    block_index,
    block_parameter,
    is_input_layer,
    is_stacked,
    num_blocks,
    path_name,
)
from vit_jax.training import schedules

DTYPES = ("float32", "bfloat16")
BELOW_ONE = checks.Range(0, 1, below=True)
RANGES = {
    "b1": BELOW_ONE,
    "b2": BELOW_ONE,
    "eps": checks.Range(0, 1, above=True),
    "momentum": BELOW_ONE,
    "decay_rate": checks.Range(0, 10, above=True),
    "min_dim_size_to_factor": checks.COUNT,
    "weight_decay": checks.Range(0, 1000),
    "layer_decay": checks.Range(0, 1, above=True, optional=True),
}
MULTIPLIERS = ("weight_decay_multipliers", "lr_multipliers")
FIELDS = ("name", "mu_dtype", "momentum_dtype", "frozen", *MULTIPLIERS, *RANGES)
ADAFACTOR_EPS = 1e-30  # added to squared gradients
MUON_RMS = 0.2  # of Muon's updates, about that of Adam's: arXiv:2502.16982, section 2.2


def create(config, params, total_steps: int):
    """Returns the gradient transformation and the learning rate of a run.

    Args:
        config: a run's configuration, of which `optimizer`, `schedule` and `grad_clip_norm` are
            used.
        params: the model's parameters, or their shapes.
        total_steps: the length of the whole run.

    Returns:
        (optax.GradientTransformation, step -> learning rate).

    Raises:
        UserError: an unknown optimizer or schedule, or a pattern that matches no parameter.
    """
    check(config)
    checks.check_param_tree(params)
    checks.check_range("total_steps", total_steps, checks.COUNT)
    optimizer = config.optimizer
    for field in MULTIPLIERS:
        check_patterns(params, [pattern for pattern, _ in optimizer[field] or ()], field)
    learning_rate = schedules.create(config.schedule, total_steps)
    clip = optax.identity()
    if config.grad_clip_norm:
        clip = optax.clip_by_global_norm(config.grad_clip_norm)
    tx = optax.chain(
        clip,
        OPTIMIZERS[optimizer.name](optimizer),
        *scale_by_path(params, optimizer.lr_multipliers or (), optimizer.layer_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
    return freeze(tx, params, optimizer.frozen), learning_rate


def check(config) -> None:
    """Raises UserError if `config.optimizer` or `grad_clip_norm` is invalid for any model."""
    checks.check_complete("config", config, ("optimizer", "schedule", "grad_clip_norm"))
    checks.check_range("config.grad_clip_norm", config.grad_clip_norm, checks.NON_NEGATIVE)
    config = config.optimizer
    checks.check_complete("config.optimizer", config, FIELDS)
    checks.check_ranges("config.optimizer", config, RANGES)
    checks.check_choice("config.optimizer.name", config.name, OPTIMIZERS)
    for field in ("mu_dtype", "momentum_dtype"):
        checks.check_choice(f"config.optimizer.{field}", config[field], DTYPES)
    for field in MULTIPLIERS:
        pairs = config[field] or ()
        if not all(is_multiplier(pair) for pair in pairs):
            raise UserError(
                f"config.optimizer.{field} is {pairs!r}; it must be pairs of pattern and factor, "
                "such as (('head', 10.0),)"
            )
    patterns = config.frozen or ()
    if isinstance(patterns, str) or not all(isinstance(pattern, str) for pattern in patterns):
        raise UserError(
            f"config.optimizer.frozen is {patterns!r}; it must be patterns, such as ('(?!head)',)"
        )


def is_multiplier(pair) -> bool:
    """Whether an entry of one of MULTIPLIERS is a pattern and a factor."""
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        return False
    return isinstance(pair[0], str) and pair[1] in checks.Range(0, 1000)


def multiplier(name: str, multipliers) -> float:
    """Returns the factor of the first pattern that matches the start of a name; 1 without one."""
    return next((factor for pattern, factor in multipliers if re.match(pattern, name)), 1.0)


def adamw(config) -> optax.GradientTransformation:
    """Adam with decoupled weight decay (arXiv:1711.05101)."""
    return optax.chain(scale_by_adam(config), weight_decay(config))


def adam(config) -> optax.GradientTransformation:
    """Adam (arXiv:1412.6980); weight decay is added to the gradient, as an L2 penalty."""
    return optax.chain(weight_decay(config), scale_by_adam(config))


def sgd(config) -> optax.GradientTransformation:
    """SGD with momentum; weight decay is added to the gradient, as an L2 penalty."""
    momentum = optax.identity()
    if config.momentum:
        momentum = optax.trace(config.momentum, accumulator_dtype=config.momentum_dtype)
    return optax.chain(weight_decay(config), momentum)


def adafactor(config) -> optax.GradientTransformation:
    """Adafactor as "Scaling Vision Transformers" has it (arXiv:2106.04560, section 3.4).

    The second moment is factored (arXiv:1804.04235): in an array whose two largest axes have at
    least `min_dim_size_to_factor` elements, its means along each of the two stand for it. It decays
    at 1 - t ** -decay_rate, at most `b2`. The first moment, in `mu_dtype`, averages what the second
    has scaled. Weight decay is decoupled. The learning rate isn't relative to the parameters, and
    updates aren't clipped.
    """

    def decay(step, exponent):
        return jnp.minimum(config.b2, 1.0 - (step + 1.0) ** -exponent)

    scale = optax.scale_by_factored_rms(
        decay_rate=config.decay_rate,
        min_dim_size_to_factor=config.min_dim_size_to_factor,
        epsilon=ADAFACTOR_EPS,
        decay_rate_fn=decay,
    )
    momentum = optax.identity()
    if config.b1:
        momentum = optax.ema(config.b1, debias=False, accumulator_dtype=config.mu_dtype)
    return optax.chain(*for_each_layer(scale), momentum, weight_decay(config))


def lamb(config) -> optax.GradientTransformation:
    """LAMB (arXiv:1904.00962): AdamW whose update of a kernel is as large as the kernel.

    Other parameters, which have no weight decay either, take Adam's update as it is, as in the
    authors' code. So do heads: they start at zero, from where a relative update hardly moves them.
    """

    def has_trust_ratio(params):
        def is_scaled(path, kernel):
            return kernel and path_name(path).partition("/")[0] not in (HEAD, PATCH_HEAD)

        return jax.tree.map_with_path(is_scaled, is_kernel(params))

    kernels = optax.masked(optax.scale_by_trust_ratio(), has_trust_ratio)
    return optax.chain(scale_by_adam(config), weight_decay(config), *for_each_layer(kernels))


def lion(config) -> optax.GradientTransformation:
    """Lion (arXiv:2302.06675), with b2=0.99 in the paper; weight decay is decoupled.

    The paper's learning rates are a third to a tenth of AdamW's, and its weight decay is as many
    times larger.
    """
    scale = optax.scale_by_lion(config.b1, config.b2, mu_dtype=config.mu_dtype)
    return optax.chain(scale, weight_decay(config))


def muon(config) -> optax.GradientTransformation:
    """Muon for the kernels of blocks, AdamW for the other parameters.

    The momentum of each kernel, as the matrix that it multiplies tokens by, is made orthogonal by
    five Newton-Schulz iterations (K. Jordan et al., kellerjordan.github.io/posts/muon, 2024; there
    `momentum` is 0.95, Nesterov's). Updates are scaled so that AdamW's learning rate and weight
    decay serve both (arXiv:2502.16982, section 2.2).
    """
    scale = optax.contrib.scale_by_muon(
        beta=config.momentum,
        mu_dtype=config.momentum_dtype,
        weight_dimension_numbers=lambda tree: jax.tree.map_with_path(matrix_axes, tree),
    )
    return optax.chain(
        optax.masked(optax.chain(scale, optax.stateless(scale_to_rms)), is_matrix),
        optax.masked(scale_by_adam(config), lambda params: invert(is_matrix(params))),
        weight_decay(config),
    )


# Gradients -> update directions, before the learning rate.
OPTIMIZERS = {
    "adamw": adamw,
    "adam": adam,
    "sgd": sgd,
    "adafactor": adafactor,
    "lamb": lamb,
    "lion": lion,
    "muon": muon,
}


def for_each_layer(tx) -> list[optax.GradientTransformation]:
    """Returns the transformations that apply one to each layer, stacked or not."""

    def is_stacked_leaf(params):
        return jax.tree.map_with_path(lambda path, _: is_stacked(path_name(path)), params)

    return [
        optax.masked(tx, lambda params: invert(is_stacked_leaf(params))),
        optax.masked(over_layers(tx), is_stacked_leaf),
    ]


def over_layers(tx) -> optax.GradientTransformation:
    """Applies a transformation to each layer of stacked parameters, as if they weren't stacked."""

    def each(function):
        def call(tree, *others):  # the parameters, or gradients, the state and the parameters
            per_layer = jax.vmap(function) if jax.tree.leaves(tree) else function
            return per_layer(tree, *others)

        return call

    return optax.GradientTransformation(each(tx.init), each(tx.update))


def is_matrix(params):
    """Returns the mask of the kernels inside blocks and the MAP head."""

    def is_kernel_of_block(path, _):
        return (block_parameter(path_name(path)) or "").endswith("kernel")

    return jax.tree.map_with_path(is_kernel_of_block, params)


def matrix_axes(path, leaf) -> optax.contrib.MuonDimensionNumbers:
    """Returns which axes of a block's kernel are the rows of its matrix, and which the columns."""
    name = path_name(path)
    first = int(is_stacked(name))
    is_out = block_parameter(name) == f"{OUT}/kernel"  # (H, d, D): its rows are over two axes
    split = leaf.ndim - 1 if is_out else first + 1
    return optax.contrib.MuonDimensionNumbers(
        tuple(range(first, split)), tuple(range(split, leaf.ndim))
    )


def scale_to_rms(updates, _):
    """Scales orthogonal matrices, whose RMS is 1 / sqrt(rows or columns), to MUON_RMS."""

    def scale(path, leaf):
        sides = [math.prod(leaf.shape[i] for i in axes) for axes in matrix_axes(path, leaf)]
        return leaf * (MUON_RMS * max(sides) ** 0.5)

    return jax.tree.map_with_path(scale, updates)


def invert(mask):
    return jax.tree.map(operator.not_, mask)


def scale_by_adam(config) -> optax.GradientTransformation:
    return optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=config.mu_dtype)


def weight_decay(config) -> optax.GradientTransformation:
    """Adds weight_decay x kernel to updates; biases, norms and tokens aren't decayed.

    `weight_decay_multipliers`, pairs (pattern, factor), scale it: see `multiplier`.
    """
    if not config.weight_decay:
        return optax.identity()
    if not config.weight_decay_multipliers:
        return optax.add_decayed_weights(config.weight_decay, mask=is_kernel)

    def add(path, update, param, decays):
        factor = multiplier(path_name(path), config.weight_decay_multipliers)
        return update + config.weight_decay * factor * param if decays else update

    return optax.stateless(
        lambda updates, params: jax.tree.map_with_path(add, updates, params, is_kernel(params))
    )


def is_kernel(params):
    """Returns the mask of the leaves named `kernel`."""
    return jax.tree.map_with_path(lambda path, _: path_name(path).endswith("kernel"), params)


def scale_by_path(params, multipliers, layer_decay) -> list[optax.GradientTransformation]:
    """Returns transformations that scale each parameter's learning rate; [] if there are none.

    Args:
        multipliers: pairs (pattern, factor), see `multiplier`.
        layer_decay: the head learns at the full rate, and each layer below it at this fraction of
            the one above: block i of n at layer_decay ** (n - i), the embedding at
            layer_decay ** (n + 1) (arXiv:2106.08254, appendix).
    """
    if not multipliers and not layer_decay:
        return []
    depth = depth_of(params)

    def factor(path, leaf):
        name = path_name(path)
        scale = multiplier(name, multipliers)
        return scale * layer_factor(name, leaf, depth, layer_decay) if layer_decay else scale

    factors = jax.tree.map_with_path(factor, params)

    def is_masked(leaf):  # a frozen parameter's update, see `freeze`
        return isinstance(leaf, optax.MaskedNode)

    def scale(updates, _):
        return jax.tree.map(
            lambda update, factor: update if is_masked(update) else update * factor,
            updates,
            factors,
            is_leaf=is_masked,
        )

    return [optax.stateless(scale)]


def layer_factor(name: str, leaf, depth: int, layer_decay: float):
    """Returns a parameter's factor under layer decay; an array over the layers if stacked."""
    if is_stacked(name):
        factors = layer_decay ** np.arange(depth, 0, -1, dtype=np.float32)
        return factors.reshape(depth, *[1] * (len(leaf.shape) - 1))
    if (index := block_index(name)) is not None:
        return layer_decay ** (depth - index)
    return layer_decay ** (depth + 1) if is_input_layer(name) else 1.0


def depth_of(params) -> int:
    """Returns the number of blocks, numbered or stacked."""
    leaves = [(path_name(path), leaf) for path, leaf in jax.tree.leaves_with_path(params)]
    stacked = next((leaf.shape[0] for name, leaf in leaves if is_stacked(name)), None)
    return stacked or num_blocks(name for name, _ in leaves)


def freeze(tx, params, patterns) -> optax.GradientTransformation:
    """Keeps parameters at their values if a pattern matches the start of their name.

    "(?!head)" freezes everything but the head. Frozen parameters get no update, no decay and no
    optimizer state, and don't count toward the norm that clipping uses. Their gradients are
    ignored: see `split_frozen`.
    """
    if not patterns:
        return tx
    check_patterns(params, patterns, "frozen")
    frozen = frozen_mask(params, patterns)
    if all(jax.tree.leaves(frozen)):
        raise UserError(f"config.optimizer.frozen {tuple(patterns)} freezes every parameter")
    labels = jax.tree.map(lambda frozen: "frozen" if frozen else "trained", frozen)
    return optax.partition({"trained": tx, "frozen": optax.set_to_zero()}, labels)


def frozen_mask(params, patterns):
    """Returns the mask of the parameters whose name a pattern of `frozen` matches."""

    def is_frozen(path, _):
        return any(re.match(pattern, path_name(path)) for pattern in patterns or ())

    return jax.tree.map_with_path(is_frozen, params)


def split_frozen(params, patterns) -> tuple:
    """Returns (trained, frozen) parameters, two trees with None in each other's places.

    A gradient with respect to the first is all that the optimizer needs; none is computed for the
    second, nor for any layer below the lowest trained one.
    """
    mask = frozen_mask(params, patterns)
    trained = jax.tree.map(lambda leaf, frozen: None if frozen else leaf, params, mask)
    frozen = jax.tree.map(lambda leaf, frozen: leaf if frozen else None, params, mask)
    return trained, frozen


def merge_frozen(trained, frozen):
    """Returns the parameters that `split_frozen` has split."""
    return jax.tree.map(
        lambda ours, other: other if ours is None else ours,
        trained,
        frozen,
        is_leaf=lambda leaf: leaf is None,
    )


def fill_frozen(grads, params):
    """Returns gradients of all parameters: zeros where those of the trained ones have None."""
    return jax.tree.map(
        lambda leaf, grad: jnp.zeros_like(leaf) if grad is None else grad, params, grads
    )


def check_patterns(params, patterns, field: str) -> None:
    """Raises UserError for a pattern that is invalid or matches no parameter."""
    names = [path_name(path) for path, _ in jax.tree.leaves_with_path(params)]
    for pattern in patterns:
        try:
            matches = any(re.match(pattern, name) for name in names)
        except re.error as error:
            raise UserError(
                f"config.optimizer.{field}: {pattern!r} is not a regular expression: {error}"
            ) from None
        if not matches:
            raise UserError(
                f"config.optimizer.{field}: {pattern!r} matches no parameter; the names are "
                f"{', '.join(names[:3])}, ..."
            )
