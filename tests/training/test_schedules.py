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
    "constant": np.full(91, 2.0),
    "step": 2.0 * 0.1 ** (STEPS // 40),
}


def rates(schedule):
    return jax.vmap(schedules.create(schedule, 100))(np.arange(101))


@pytest.mark.parametrize("name", schedules.SCHEDULES)
def test_schedules_follow_their_formulas(name, tiny_config):
    tiny_config.schedule.update(
        name=name, base_lr=2.0, warmup_steps=10, timescale=20, cooldown_steps=15, decay_steps=40
    )
    values = rates(tiny_config.schedule)
    np.testing.assert_allclose(values[:11], np.arange(11) * 0.2, rtol=1e-6)
    np.testing.assert_allclose(values[10:], EXPECTED[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_schedules_end_at_end_lr(name, tiny_config):
    tiny_config.schedule.update(name=name, end_lr=1e-4)
    assert rates(tiny_config.schedule)[-1] == pytest.approx(1e-4)


def test_mistakes_are_named(tiny_config):
    schedule = tiny_config.schedule
    schedule.warmup_steps = 10
    with pytest.raises(UserError, match="warmup_steps 10 must be below the run's 10 steps"):
        schedules.create(schedule, 10)
    schedule.name = "step"
    with pytest.raises(UserError, match="decay_steps is 0; it must be a whole number >= 1"):
        schedules.check(schedule)
    schedule.name = "cosin"
    for function in (schedules.check, lambda config: schedules.create(config, 100)):
        with pytest.raises(UserError, match="schedule.name is 'cosin'; it must be 'cosine'"):
            function(schedule)
