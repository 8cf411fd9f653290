"""Learning rate schedules against their formulas."""

import jax
import numpy as np
import pytest

from vit_jax.errors import UserError
from vit_jax.training import schedules

STEPS = np.arange(10, 101)  # after the warmup
EXPECTED = {  # every schedule needs a row
    "cosine": 1 + np.cos(np.pi * (STEPS - 10) / 90),
    "linear": 2.0 * (100 - STEPS) / 90,
    "rsqrt": 2.0 / np.sqrt(1 + (STEPS - 10) / 20) * np.minimum(1, (100 - STEPS) / 15),
    "constant": 2.0 * np.minimum(1, (100 - STEPS) / 15),
    "step": 2.0 * 0.1 ** (STEPS // 40),
}


def rates(schedule):
    return jax.vmap(schedules.create(schedule, 100))(np.arange(101))


@pytest.mark.parametrize("name", schedules.SCHEDULES)
def test_schedules_follow_their_formulas(name, tiny_config):
    cooldown_steps = 15 if name in schedules.WITH_COOLDOWN else 0
    tiny_config.schedule.update(name=name, base_lr=2.0, warmup_steps=10)
    tiny_config.schedule.update(timescale=20, cooldown_steps=cooldown_steps, decay_steps=40)
    values = rates(tiny_config.schedule)
    np.testing.assert_allclose(values[:11], np.arange(11) * 0.2, rtol=1e-6)
    np.testing.assert_allclose(values[10:], EXPECTED[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["cosine", "linear", *schedules.WITH_COOLDOWN])
def test_schedules_end_at_end_lr(name, tiny_config):
    cooldown_steps = 15 if name in schedules.WITH_COOLDOWN else 0
    tiny_config.schedule.update(name=name, end_lr=1e-4, cooldown_steps=cooldown_steps)
    assert rates(tiny_config.schedule)[-1] == pytest.approx(1e-4)


@pytest.mark.parametrize("name", schedules.WITH_COOLDOWN)
def test_a_cool_down_leaves_earlier_steps_alone(name, tiny_config):
    """Until it starts, the rate has the same bits whatever the total, with and without it."""
    schedule = tiny_config.schedule
    schedule.update(name=name, base_lr=3e-3, end_lr=1e-4, warmup_steps=10, timescale=20)
    stable = jax.vmap(schedules.create(schedule, 100))(np.arange(101))
    schedule.cooldown_steps = 15
    for total_steps in (40, 60, 100, 1000):
        cooled = jax.vmap(schedules.create(schedule, total_steps))(np.arange(total_steps + 1))
        start = total_steps - 15
        np.testing.assert_array_equal(cooled[: start + 1][:101], stable[: start + 1])
        assert (np.diff(cooled[start:]) < 0).all()


def test_mistakes_are_named(tiny_config):
    schedule = tiny_config.schedule
    schedule.warmup_steps = 10
    with pytest.raises(UserError, match="warmup_steps 10 must be below the run's 10 steps"):
        schedules.create(schedule, 10)
    for name in schedules.WITH_COOLDOWN:
        schedule.update(name=name, cooldown_steps=95)
        with pytest.raises(UserError, match="steps 10 and cooldown_steps 95 are more than .* 100"):
            schedules.create(schedule, 100)
    schedule.name = "cosine"
    with pytest.raises(UserError, match="cooldown_steps is 95; it must be 0 with .* 'cosine'"):
        schedules.check(schedule)
    schedule.update(name="step", cooldown_steps=0)
    with pytest.raises(UserError, match="decay_steps is 0; it must be a whole number >= 1"):
        schedules.check(schedule)
    schedule.name = "cosin"
    for function in (schedules.check, lambda config: schedules.create(config, 100)):
        with pytest.raises(UserError, match="schedule.name is 'cosin'; it must be 'cosine'"):
            function(schedule)
