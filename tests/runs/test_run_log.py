import contextlib
import logging
import resource

import jax.numpy as jnp
import tensorflow as tf
from whole_runs import rows

from vit_jax.runs import run_log

NUMBERS = ("loss", "accuracy", "learning_rate")


def log_steps(workdir, config, first, last):
    with contextlib.closing(run_log.RunLog(workdir, first, config)) as log:
        for step in range(first + 1, last + 1):
            log.record(step, {name: jnp.float32(step) for name in NUMBERS})


def points(workdir):
    """(step, name, value) of each point in TensorBoard's files, and what they begin after."""
    found, starts = [], []
    for path in sorted(workdir.glob("events.out.tfevents.*")):
        for event in tf.compat.v1.train.summary_iterator(str(path)):
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            starts += [event.step] if event.HasField("session_log") else []
    return found, starts


def test_rows_and_curves_say_the_same(tmp_path, tiny_config):
    tiny_config.update(log_every_steps=1, total_steps=5)
    log_steps(tmp_path, tiny_config, 2, 5)
    expected = [
        (row["step"], name, value)
        for row in rows(tmp_path)
        for name, value in row.items()
        if name not in ("step", "train/images_per_second")
    ]
    found, starts = points(tmp_path)
    assert [point for point in found if "per_second" not in point[1]] == expected
    assert len(expected) == 3 * len(NUMBERS)
    assert starts == [3]  # of an earlier start, what comes from there on isn't shown


def test_a_full_disk_does_not_end_the_run(tmp_path, tiny_config, caplog):
    """Rows wait for room; the curves end, and say so once."""
    tiny_config.update(log_every_steps=1, total_steps=200)
    caplog.set_level(logging.ERROR, "vit_jax")
    log = run_log.RunLog(tmp_path, 0, tiny_config)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, limits[1]))  # as if the disk were full
    try:
        for step in range(1, 200):
            log.record(step, {name: jnp.float32(step) for name in NUMBERS})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caplog.text.count("TensorBoard's events can't be written") == 1
    assert "rows wait, and the run goes on" in caplog.text
    log.record(200, {name: jnp.float32(200) for name in NUMBERS})
    log.close()
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 201))
