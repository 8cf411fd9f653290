"""Traces of a run's steps: `--profile=FIRST:LAST`."""

import gzip
import json

import pytest
from whole_runs import quick_config, untimed_rows

import train
from vit_jax.errors import UserError
from vit_jax.logs import profile
from vit_jax.storage.mirror import Mirror


def traced_steps(folder) -> set[int]:
    """The steps in the trace of one process, which has a single one."""
    (path,) = folder.glob("plugins/profile/*/perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    steps = [e["args"]["step_num"] for e in events if "step_num" in e.get("args", {})]
    return {int(step) for step in steps}


@pytest.mark.slow
def test_a_trace_has_its_steps_and_leaves_the_numbers_alone(on_one_device, tmp_path):
    config = quick_config(total_steps=4, log_every_steps=1, eval_every_steps=0)
    config.schedule.warmup_steps = 1
    assert train.train(config, tmp_path / "plain") == train.train(
        config, tmp_path / "traced", profile_steps=range(2, 4)
    )
    assert untimed_rows(tmp_path / "traced") == untimed_rows(tmp_path / "plain")
    assert traced_steps(tmp_path / "traced" / "profile" / "process_0") == {2, 3}
    assert "xprof --logdir" in (tmp_path / "traced" / "train.log").read_text()

    train.train(config, tmp_path / "traced", profile_steps=range(1, 3))  # resumes at the end
    assert "No trace is written" in (tmp_path / "traced" / "train.log").read_text()
    with pytest.raises(UserError, match="--profile is 3:5, but the run has 4 steps"):
        train.train(config, tmp_path / "refused", profile_steps=range(3, 6))


def test_a_resumed_run_traces_the_steps_to_come(tmp_path):
    assert profile.Profile(Mirror(tmp_path), range(10, 16), first_step=12).steps == range(13, 16)


@pytest.mark.parametrize("text", ["", "10", "15:10", "0:3", "1:2:3", "a:b", "-1:2"])
def test_steps_that_cannot_be_read(text):
    with pytest.raises(ValueError, match="FIRST:LAST"):
        profile.parse_steps(text)
