"""Programs that hang, and say where."""

import time

import pytest
from whole_runs import quick_config

import train
from vit_jax.parallel.watchdog import Watchdog


def hang_until(happened) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_hang_is_logged_once_with_the_stacks(caplog):
    with Watchdog(0.2) as watchdog:
        watchdog.beat("step 1")
        caplog.clear()  # of a hang before it, on a busy machine
        for count in (1, 2):
            watchdog.beat(f"step {count}")
            hang_until(lambda count=count: len(caplog.records) == count)
            time.sleep(0.5)  # longer than it takes to notice a hang
            assert len(caplog.records) == count
    for count, text in enumerate(caplog.messages, start=1):
        assert f"No progress for 0.2 s (--hang_seconds) since step {count}; the stacks of" in text
        assert "in hang_until" in text or "in test_a_hang_is_logged_once" in text
        assert "in watch" in text  # of the other thread


def test_what_goes_on_is_not_logged(caplog):
    for seconds, beats in ((60, 3), (0, 0)):
        with Watchdog(seconds) as watchdog:
            for i in range(beats):
                watchdog.beat(f"step {i}")
            time.sleep(0.1)
    assert not caplog.records


@pytest.mark.slow
def test_a_step_that_hangs(on_one_device, tmp_path, monkeypatch):
    """The run goes on once it answers; train.log has where it was."""
    log = tmp_path / "train.log"

    def record(run_log, step, values, record=train.run_log.RunLog.record):
        record(run_log, step, values)
        if step == 3:
            hang_until(lambda: "No progress" in log.read_text())

    monkeypatch.setattr(train.run_log.RunLog, "record", record)
    config = quick_config(total_steps=4, log_every_steps=1, eval_every_steps=0)
    config.schedule.warmup_steps = 1
    train.train(config, tmp_path, hang_seconds=5)
    text = log.read_text()
    assert text.count("No progress for 5 s (--hang_seconds) since step 2") == 1
    assert "in hang_until" in text
    assert "step 4/4" in text


@pytest.mark.slow
@pytest.mark.parametrize("slow", ["input", "device"])
def test_a_run_shows_what_it_waits_for(slow, on_one_device, tmp_path, monkeypatch):
    """Whichever is made slow is where the time goes."""

    def slowed(function):
        def call(*args, **kwargs):
            time.sleep(0.2)
            return function(*args, **kwargs)

        return call

    if slow == "device":
        monkeypatch.setattr(train.run_log.jax, "block_until_ready", slowed(lambda x: x))
    else:
        to_devices = train.feeding.to_devices
        monkeypatch.setattr(
            train.feeding, "to_devices", lambda *args: map(slowed(lambda x: x), to_devices(*args))
        )
    config = quick_config(total_steps=12, log_every_steps=6, eval_every_steps=0)
    config.schedule.warmup_steps = 1
    train.train(config, tmp_path)
    row = next(row for row in train.run_log.read_rows(tmp_path) if row["step"] == 12)
    other = {"input": "device", "device": "input"}[slow]
    assert row[f"train/{slow}_wait"] > row[f"train/{other}_wait"]
    assert row["train/images_per_second"] == pytest.approx(64 * row["train/steps_per_second"])
