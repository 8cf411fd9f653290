"""The optimizer: schedule, clipping, update rule, decay, and who learns how fast."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vit_jax.errors import UserError
from vit_jax.paths import path_name


def create(config, params, total_steps: int):
    """The gradient transformation and the learning rate of a run.

    Args:
        config: with `optimizer`, `schedule` and `grad_clip_norm` (see configs/common.py).
        params: the model's parameters, or their shapes.
        total_steps: steps of the whole run.

    Returns:
        (optax.GradientTransformation, step -> learning rate).

    Raises:
        UserError: an unknown optimizer or schedule, or a path pattern that matches nothing.
    """
    learning_rate = schedule(config.schedule, total_steps)
    optimizer = config.optimizer
    clip = optax.identity()
    if config.grad_clip_norm:
        clip = optax.clip_by_global_norm(config.grad_clip_norm)
    tx = optax.chain(
        clip,
        update_rule(optimizer),
        *scale_by_path(params, optimizer.lr_multipliers, optimizer.layer_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
    return freeze(tx, params, optimizer.frozen), learning_rate


def update_rule(optimizer) -> optax.GradientTransformation:
    """Gradients -> directions, before the learning rate.

    "adamw" adds the decay beside Adam's direction (arXiv:1711.05101); "adam" and "sgd" add it to
    the gradient, as L2 regularisation does. Kernels decay; biases, norms, tokens don't.
    """
    decay = optax.identity()
    if optimizer.weight_decay:
        decay = optax.add_decayed_weights(optimizer.weight_decay, mask=kernels)
    for field in ("mu_dtype", "momentum_dtype"):
        if optimizer[field] not in ("float32", "bfloat16"):
            raise UserError(
                f"config.optimizer.{field} is {optimizer[field]!r}; it can be 'float32', 'bfloat16'"
            )
    if optimizer.name == "sgd":
        momentum = optax.trace(optimizer.momentum, accumulator_dtype=optimizer.momentum_dtype)
        return optax.chain(decay, momentum if optimizer.momentum else optax.identity())
    if optimizer.name in ("adam", "adamw"):
        adam = optax.scale_by_adam(
            optimizer.b1, optimizer.b2, optimizer.eps, mu_dtype=optimizer.mu_dtype
        )
        return optax.chain(adam, decay) if optimizer.name == "adamw" else optax.chain(decay, adam)
    raise UserError(
        f"config.optimizer.name is {optimizer.name!r}; it can be 'adamw', 'adam', 'sgd'"
    )


def schedule(config, total_steps: int):
    """step -> learning rate: a linear warm-up from 0 to base_lr, then the named decay.

    name: "cosine" and "linear" fall to `end_lr` at the last step; "rsqrt" goes as
    base_lr / sqrt(1 + t / timescale), t the steps since the warm-up, and falls linearly to 0
    over the last `cooldown_steps` (arXiv:2106.04560, section 3.5); "constant"; "step"
    multiplies by `decay_factor` every `decay_steps` steps of the run.
    """
    base, end, warmup = config.base_lr, config.end_lr, config.warmup_steps
    if config.name not in ("cosine", "linear", "rsqrt", "constant", "step"):
        known = "'cosine', 'linear', 'rsqrt', 'constant', 'step'"
        raise UserError(f"config.schedule.name is {config.name!r}; it can be {known}")
    if warmup and warmup >= total_steps:
        raise UserError(
            f"config.schedule.warmup_steps {warmup} leaves nothing of the run's {total_steps} "
            "steps: lower it, or train longer"
        )
    if config.name == "step" and not config.decay_steps > 0:
        raise UserError("config.schedule.name 'step' needs config.schedule.decay_steps above 0")

    def learning_rate(step):
        step = jnp.asarray(step, jnp.float32)
        progress = jnp.clip((step - warmup) / max(total_steps - warmup, 1), 0.0, 1.0)
        if config.name == "cosine":
            rate = end + (base - end) * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        elif config.name == "linear":
            rate = end + (base - end) * (1.0 - progress)
        elif config.name == "rsqrt":
            rate = base / jnp.sqrt(1.0 + jnp.maximum(step - warmup, 0.0) / config.timescale)
            if config.cooldown_steps:
                rate *= jnp.clip((total_steps - step) / config.cooldown_steps, 0.0, 1.0)
        elif config.name == "step":
            rate = base * config.decay_factor ** jnp.floor(step / config.decay_steps)
        else:
            rate = base
        return rate * jnp.minimum(1.0, step / warmup) if warmup else jnp.asarray(rate, jnp.float32)

    return learning_rate


def kernels(params):
    """The mask of leaves that weight decay applies to: those named `kernel`."""
    return jax.tree.map_with_path(lambda path, _: path_name(path).endswith("kernel"), params)


def scale_by_path(params, multipliers, layer_decay):
    """Transformations that scale the updates: [] where nothing is asked for.

    multipliers: pairs (pattern, factor); the first pattern that matches a parameter's path from
        its beginning (`re.match` on "Transformer/encoderblock_0/...") counts.
    layer_decay: the head learns at the full rate, and each layer below at this fraction of the
        layer above: block i of n at layer_decay ** (n - i), the embedding at ** (n + 1)
        (arXiv:2106.08254, appendix).
    """
    if not multipliers and not layer_decay:
        return []
    if not all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in multipliers):
        raise UserError(
            f"config.optimizer.lr_multipliers is {multipliers!r}; it takes pairs, such as "
            "(('head', 10.0),)"
        )
    check_patterns(params, [pattern for pattern, _ in multipliers], "lr_multipliers")
    depth = num_blocks(params)

    def factor(path, leaf):
        name = path_name(path)
        scale = next((value for pattern, value in multipliers if re.match(pattern, name)), 1.0)
        return scale * layer_factor(name, leaf, depth, layer_decay) if layer_decay else scale

    factors = jax.tree.map_with_path(factor, params)

    def masked(leaf):  # `freeze` takes the frozen leaves out of the updates
        return isinstance(leaf, optax.MaskedNode)

    def scale(updates, _):
        return jax.tree.map(
            lambda update, factor: update if masked(update) else update * factor,
            updates,
            factors,
            is_leaf=masked,
        )

    return [optax.stateless(scale)]


def layer_factor(name, leaf, depth, layer_decay):
    """The rate of one parameter under layer decay: a number, or one a layer where stacked."""
    if block := re.search(r"encoderblock_(\d+)/", name):
        return layer_decay ** (depth - int(block[1]))
    if "encoderblock/" in name:
        factors = layer_decay ** np.arange(depth, 0, -1, dtype=np.float32)
        return factors.reshape(depth, *[1] * (len(leaf.shape) - 1))
    if re.match("embedding|cls|Transformer/posembed_input|conv_root|gn_root|block", name):
        return layer_decay ** (depth + 1)
    return 1.0


def num_blocks(params) -> int:
    transformer = params["Transformer"]
    if "encoderblock" in transformer:
        return jax.tree.leaves(transformer["encoderblock"])[0].shape[0]
    return sum(name.startswith("encoderblock_") for name in transformer)


def freeze(tx, params, patterns):
    """Leaves the parameters whose path matches a pattern, from its beginning, as they are.

    "(?!head)" is everything but the head.
    They get no update, no decay and no optimizer state, and don't count in the clipped norm.
    """
    if not patterns:
        return tx
    check_patterns(params, patterns, "frozen")

    def label(path, _):
        frozen = any(re.match(pattern, path_name(path)) for pattern in patterns)
        return "frozen" if frozen else "trained"

    labels = jax.tree.map_with_path(label, params)
    if "trained" not in jax.tree.leaves(labels):
        raise UserError(f"config.optimizer.frozen {tuple(patterns)} freezes every parameter")
    return optax.partition({"trained": tx, "frozen": optax.set_to_zero()}, labels)


def check_patterns(params, patterns, field: str) -> None:
    names = [path_name(path) for path, _ in jax.tree.leaves_with_path(params)]
    for pattern in patterns:
        try:
            matches = any(re.match(pattern, name) for name in names)
        except re.error as error:
            raise UserError(
                f"config.optimizer.{field}: {pattern!r} is no regular expression: {error}"
            ) from None
        if not matches:
            raise UserError(
                f"config.optimizer.{field}: {pattern!r} matches no parameter; "
                f"there are {', '.join(names[:3])}, ..."
            )
