"""metrics.jsonl and TensorBoard's curves."""

import contextlib
import json
import logging
import resource

import jax.numpy as jnp
import pytest
from tensorboardX.proto.event_pb2 import Event
from whole_runs import TIMED, rows

from vit_jax.logs import run_log
from vit_jax.storage.mirror import Mirror

NAMES = ("loss", "accuracy", "learning_rate")
EVALUATION = dict(loss=0.1, accuracy=0.9, accuracy_top5=1.0)


def step_metrics(step):
    return {name: jnp.float32(step) for name in NAMES}


def log_steps(workdir, config, first, last):
    with contextlib.closing(run_log.RunLog(Mirror(workdir), first, config)) as log:
        for step in range(first + 1, last + 1):
            log.record(step, step_metrics(step))


def events(path):
    """The events of a TensorBoard file: records of length, checksum, data, checksum."""
    content = path.read_bytes()
    while content:
        length = int.from_bytes(content[:8], "little")
        data, content = content[12 : 12 + length], content[16 + length :]
        yield Event.FromString(data)


def test_rows_and_curves_have_the_same_numbers(tmp_path, tiny_config):
    tiny_config.update(log_every_steps=1, total_steps=5)
    log_steps(tmp_path, tiny_config, 2, 5)
    expected = [
        (row["step"], name, value)
        for row in rows(tmp_path)
        for name, value in row.items()
        if name != "step" and name not in TIMED
    ]
    (path,) = tmp_path.glob("events.out.tfevents.*")
    points = [
        (event.step, value.tag, value.simple_value)
        for event in events(path)
        for value in event.summary.value
        if value.tag not in TIMED
    ]
    assert points == expected
    assert len(expected) == 3 * len(NAMES)
    # TensorBoard hides the points that an earlier start has from this step on.
    starts = [event.step for event in events(path) if event.HasField("session_log")]
    assert starts == [3]


def test_mfu_is_the_share_of_the_peak_speed(tmp_path, tiny_config):
    tiny_config.update(log_every_steps=1, total_steps=2)
    log = run_log.RunLog(Mirror(tmp_path), 0, tiny_config, peak_images_per_second=1e6)
    with contextlib.closing(log):
        log.record(1, step_metrics(1))
    (row,) = rows(tmp_path)
    assert row["train/mfu"] == row["train/images_per_second"] / 1e6
    log_steps(tmp_path, tiny_config, 1, 2)
    assert "train/mfu" not in rows(tmp_path)[-1]  # without a peak, as on a CPU


def test_a_resumed_run_writes_each_row_once(tmp_path, tiny_config):
    """Rows after the step that it resumes at go, and one that a kill truncated."""
    tiny_config.update(log_every_steps=1, total_steps=5)
    log_steps(tmp_path, tiny_config, 0, 4)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "train/lo')
    log_steps(tmp_path, tiny_config, 2, 5)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5]


def test_lines_that_are_not_rows_are_set_aside(tmp_path, tiny_config, caplog):
    tiny_config.update(log_every_steps=1, total_steps=5)
    log_steps(tmp_path, tiny_config, 0, 2)
    foreign = [b"\0\xff\0", b"# a note", b"[3]", b'{"loss": 1.0}', b'{"step": "1"}']
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join([*foreign, path.read_bytes()]) + b'{"step": 3, "train/lo')
    log_steps(tmp_path, tiny_config, 2, 3)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3]
    assert (tmp_path / "corrupt_metrics.jsonl").read_bytes().split(b"\n")[:-1] == foreign
    assert "metrics.jsonl: 5 lines aren't rows of a run, the first in line 1; moved" in caplog.text


def test_rows_of_an_earlier_start_are_kept(tmp_path, tiny_config, caplog):
    """A run that starts anew, perhaps with another configuration, destroys no numbers."""
    tiny_config.update(log_every_steps=1, total_steps=5)
    log_steps(tmp_path, tiny_config, 0, 3)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    log_steps(tmp_path, tiny_config, 0, 1)
    assert [row["step"] for row in rows(tmp_path)] == [1]
    assert (tmp_path / "earlier_metrics.jsonl").read_bytes() == before
    assert "3 rows are of an earlier start" in caplog.text


def test_a_restart_knows_which_evaluations_its_step_has(tmp_path, tiny_config):
    def evaluated(step):
        with contextlib.closing(run_log.RunLog(Mirror(tmp_path), step, tiny_config)) as log:
            return log.evaluated

    with contextlib.closing(run_log.RunLog(Mirror(tmp_path), 0, tiny_config)) as log:
        log.write_evaluation(3, "val", EVALUATION)
        log.write_evaluation(3, "real", EVALUATION)
        log.write(4, "train", dict(loss=1.0))
    assert [set(row) for row in rows(tmp_path)][1] == {"step", *(f"real/{n}" for n in EVALUATION)}
    assert evaluated(4) == {"train"}
    assert evaluated(3) == {"val", "real"}
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 3, "real/loss": 0.1}) + "\n")
    assert evaluated(3) == {"real"}


def test_skipped_updates_are_logged_until_there_are_too_many(tmp_path, tiny_config, monkeypatch):
    monkeypatch.setattr(run_log, "MAX_SKIPPED_IN_A_ROW", 3)
    tiny_config.update(log_every_steps=1, on_nonfinite="skip")
    losses = [1.0, float("nan"), float("nan"), 1.0, float("nan"), float("nan"), float("nan")]
    with contextlib.closing(run_log.RunLog(Mirror(tmp_path), 0, tiny_config)) as log:
        for step, loss in enumerate(losses[:-1], start=1):
            log.record(step, step_metrics(step) | dict(loss=loss))
        with pytest.raises(
            run_log.NonFiniteError, match=r"Step 7: .*loss nan.* 3 updates in a row"
        ):
            log.record(7, step_metrics(7) | dict(loss=losses[-1]))
    assert "train/loss" not in rows(tmp_path)[1]


def test_a_full_disk_does_not_end_the_run(tmp_path, tiny_config, caplog):
    """Rows are written once there is room; the curves end, which is logged once."""
    tiny_config.update(log_every_steps=1, total_steps=200)
    caplog.set_level(logging.ERROR, "vit_jax")
    log = run_log.RunLog(Mirror(tmp_path), 0, tiny_config)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, limits[1]))  # acts like a full disk
    try:
        for step in range(1, 200):
            log.record(step, step_metrics(step))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caplog.text.count("TensorBoard's events can't be written") == 1
    assert "the run continues, and" in caplog.text
    log.record(200, step_metrics(200))
    log.close()
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 201))


def test_files_that_are_deleted_are_written_anew(tmp_path, tiny_config, caplog):
    tiny_config.update(log_every_steps=1, total_steps=3)
    with contextlib.closing(run_log.RunLog(Mirror(tmp_path), 0, tiny_config)) as log:
        log.record(1, step_metrics(1))
        (tmp_path / "metrics.jsonl").unlink()
        log.record(2, step_metrics(2))
        log.record(3, step_metrics(3))
    assert [row["step"] for row in rows(tmp_path)] == [2, 3]
    assert caplog.text.count("metrics.jsonl was moved or deleted") == 1
