"""Learning rate schedules: a linear warmup from 0 to `base_lr`, then one of SCHEDULES.

To add one, write a function of (step, config, total_steps) and give it a row in SCHEDULES. `step`,
the number of updates already taken, is a float32 scalar from 0 to total_steps - 1; `config` is
`config.schedule`. The function is also called during the warmup, where it must return `base_lr`,
which the caller multiplies by step / warmup_steps. The formula goes into EXPECTED in
tests/training/test_schedules.py.

A new field gets its default in configs/common.py and its valid values in RANGES. If it counts
steps, add a check to `create` that it fits the run, and a line to `quick` in configs/common.py that
shrinks it.
"""

from collections.abc import Callable

import jax.numpy as jnp

from vit_jax import checks
from vit_jax.errors import UserError


def cosine(step, config, total_steps):
    """Falls along half a cosine, to reach `end_lr` at `total_steps` (arXiv:1608.03983)."""
    share = 0.5 * (1.0 + jnp.cos(jnp.pi * progress(step, config, total_steps)))
    return config.end_lr + (config.base_lr - config.end_lr) * share


def linear(step, config, total_steps):
    """Falls along a line, to reach `end_lr` at `total_steps`."""
    share = 1.0 - progress(step, config, total_steps)
    return config.end_lr + (config.base_lr - config.end_lr) * share


def rsqrt(step, config, total_steps):
    """Falls as base_lr / sqrt(1 + t / timescale), t counted from the end of the warmup.

    Ends with a cool-down (arXiv:2106.04560, section 3.5).
    """
    since_warmup = jnp.maximum(step - config.warmup_steps, 0.0)
    rate = config.base_lr / jnp.sqrt(1.0 + since_warmup / config.timescale)
    return cool_down(rate, step, config, total_steps)


def constant(step, config, total_steps):
    """Stays at `base_lr`, and ends with a cool-down: "warmup-stable-decay" (arXiv:2404.06395)."""
    return cool_down(config.base_lr, step, config, total_steps)


def staircase(step, config, total_steps):
    """Starts at `base_lr` and is multiplied by `decay_factor` every `decay_steps` steps."""
    return config.base_lr * config.decay_factor ** jnp.floor(step / config.decay_steps)


RANGES = {
    "base_lr": checks.Range(0, 1000),
    "end_lr": checks.Range(0, 1000),
    "warmup_steps": checks.COUNT_OR_ZERO,
    "timescale": checks.Range(0, 2**31, above=True),
    "cooldown_steps": checks.COUNT_OR_ZERO,
    "decay_steps": checks.COUNT_OR_ZERO,
    "decay_factor": checks.Range(0, 1, above=True),
}

SCHEDULES = {
    "cosine": cosine,
    "linear": linear,
    "rsqrt": rsqrt,
    "constant": constant,
    "step": staircase,
}

WITH_COOLDOWN = ("rsqrt", "constant")


def create(config, total_steps: int) -> Callable:
    """Returns the function step -> learning rate, a float32 scalar.

    Args:
        config: `config.schedule`.
        total_steps: the length of the whole run.

    Raises:
        UserError: an unknown schedule, or a warmup that takes the whole run.
    """
    check(config)
    schedule, warmup = SCHEDULES[config.name], config.warmup_steps
    if warmup and warmup >= total_steps:
        raise UserError(
            f"config.schedule.warmup_steps {warmup} must be below the run's {total_steps} steps: "
            "lower it, or train longer"
        )
    has_cooldown = config.name in WITH_COOLDOWN
    if has_cooldown and warmup + config.cooldown_steps > total_steps:
        raise UserError(
            f"config.schedule.warmup_steps {warmup} and cooldown_steps {config.cooldown_steps} "
            f"are more than the run's {total_steps} steps: lower one, or train longer"
        )

    def learning_rate(step):
        step = jnp.asarray(step, jnp.float32)
        rate = schedule(step, config, total_steps)
        return rate * jnp.minimum(1.0, step / warmup) if warmup else jnp.asarray(rate, jnp.float32)

    return learning_rate


def check(config) -> None:
    """Raises UserError if `config.schedule` is invalid for a run of any length."""
    checks.check_complete("config.schedule", config, ("name", *RANGES))
    checks.check_choice("config.schedule.name", config.name, SCHEDULES)
    checks.check_ranges("config.schedule", config, RANGES)
    if config.name == "step":
        checks.check_range("config.schedule.decay_steps", config.decay_steps, checks.COUNT)
    if config.cooldown_steps and config.name not in WITH_COOLDOWN:
        raise UserError(
            f"config.schedule.cooldown_steps is {config.cooldown_steps}; it must be 0 with "
            f"config.schedule.name {config.name!r}: only 'rsqrt' and 'constant' have a cool-down"
        )


def cool_down(rate, step, config, total_steps):
    """Lowers a rate to `end_lr` at `total_steps`, linearly over the last `cooldown_steps`.

    Until then the rate is itself, to the bit: it doesn't depend on `total_steps`, so a run can be
    cooled down from any of its checkpoints (docs/branches.md).
    """
    if not config.cooldown_steps:
        return rate
    share = jnp.clip((total_steps - step) / config.cooldown_steps, 0.0, 1.0)
    return rate * share + config.end_lr * (1.0 - share)


def progress(step, config, total_steps):
    """Returns the completed share of the steps after the warmup, from 0 to 1."""
    steps = max(total_steps - config.warmup_steps, 1)
    return jnp.clip((step - config.warmup_steps) / steps, 0.0, 1.0)
