"""Requests to stop a script. tests/parallel/test_distributed.py stops a run in this process."""

import re
import signal

import forked
import pytest
from whole_runs import assert_same_run, wait_for

slow = pytest.mark.slow


@slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_stopped_script_saves_and_resumes_to_the_bit(number, tmp_path):
    if signal.getsignal(number) == signal.SIG_IGN:
        pytest.skip("ignored here, as under nohup")
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    flags = ("--config=configs/digits.py:quick", "--config.log_every_steps=5")
    script = forked.Script("train.py", *flags, f"--workdir={stopped}")
    wait_for(stopped / "train.log", "step 5/60", script)
    script.send_signal(number)
    result = script.finish()
    assert result.returncode == 75, result.stderr
    step = int(re.search(r"Stopped after step (\d+), saved", result.stderr)[1])
    assert (stopped / "checkpoints" / str(step)).is_dir()
    resumed = forked.run_script("train.py", *flags, f"--workdir={stopped}")
    assert resumed.returncode == 0, resumed.stderr
    assert f"Resuming at step {step} of 60" in resumed.stdout
    assert forked.run_script("train.py", *flags, f"--workdir={whole}").returncode == 0
    assert_same_run(stopped, whole)


STOPPED = """
import os, signal, sys, time
import jax.numpy as jnp
from launch import local
from vit_jax.parallel import distributed, preemption
from vit_jax.runs import checkpoint
from vit_jax.training import train_state
sync_points, step = map(int, sys.argv[2:])

def request_stop():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(10)  # until JAX has set the sync point to stop at

distributed.start(f"localhost:{local.free_port()}", 1, 0)
weights = dict(w=jnp.ones(2))
state = train_state.TrainState(
    step=jnp.int32(step), params=weights, opt_state=weights, skipped=jnp.int32(0)
)
checkpoints = checkpoint.Checkpoints(sys.argv[1])
if not sync_points:
    request_stop()
with preemption.Preemption() as stop:
    for _ in range(sync_points):
        assert not stop.sync()
    checkpoints.save(step, state)
    checkpoints.finish_saving()
    if sync_points:
        request_stop()
    deadline = time.monotonic() + 30
    while not stop.sync() and time.monotonic() < deadline:
        time.sleep(0.1)
print("stopped" if stop.stopping else "continued", stop.sync_points - sync_points, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sync_points", "step"),
    [(5, 300), pytest.param(100, 60, marks=slow), pytest.param(0, 0, marks=slow)],
)
def test_a_save_does_not_move_the_sync_point_to_stop_at(sync_points, step, tmp_path):
    """In a cluster: the step is ahead of the sync points after a restart, behind them after
    evaluations, and a request may come before the first one."""
    (tmp_path / "stopped.py").write_text(STOPPED)
    args = (str(tmp_path / "stopped.py"), tmp_path / "run", sync_points, step)
    result = forked.run_script(*args)
    assert result.stdout == "stopped 1\n", result.stdout + result.stderr


JOINED = """
import time
from launch import local
from vit_jax.parallel import distributed
distributed.start(f"localhost:{local.free_port()}", 1, 0, preemptible=False)
print("joined", flush=True)
time.sleep(60)
"""


def test_sigterm_ends_scripts_that_save_nothing(tmp_path):
    """In a cluster too, where JAX would take it for a preemption notice."""
    (tmp_path / "joined.py").write_text(JOINED)
    script = forked.Script(str(tmp_path / "joined.py"))
    wait_for(script.paths[0], "joined", script)
    script.send_signal(signal.SIGTERM)
    assert script.finish(timeout=30).returncode == -signal.SIGTERM
