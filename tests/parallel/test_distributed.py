"""Several processes as one program, over CPU collectives, and runs that are asked to stop."""

import functools
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import soak
from PIL import Image
from whole_runs import ONE_DEVICE, ROOT, assert_same_run, command

import command_line
import evaluate
import train
from configs import digits
from launch import local
from vit_jax.errors import UserError
from vit_jax.parallel import distributed
from vit_jax.runs import checkpoint

QUICK = ("--config=configs/digits.py:quick", "--config.checkpoint_every_steps=20")


def launch(*arguments, processes=2, devices=2):
    """Starts a script by launch/local.py."""
    return subprocess.Popen(
        [
            sys.executable,
            ROOT / "launch" / "local.py",
            f"--num_processes={processes}",
            f"--devices={devices}",
            *arguments,
        ],
        cwd=ROOT,
        env=ONE_DEVICE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process, code=0):
    """(stdout, stderr) of a process that ends with this code."""
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == code, stderr
    return stdout, stderr


def alone(*arguments, devices=4):
    """Training by one process."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    env = ONE_DEVICE | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    options = dict(cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command(*arguments), **options)


def wait_for(path: pathlib.Path, text: str, process) -> None:
    """Until a file has some text."""
    while not path.exists() or text not in path.read_text():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def assert_close(workdir, other):
    """Two runs whose numbers agree to float32 rounding."""
    for ours, theirs in zip(soak.rows(workdir), soak.rows(other), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)
    (_, params), (_, expected) = map(checkpoint.restore_params, (workdir, other))
    for path, leaf in jax.tree.leaves_with_path(params):
        if not jax.tree_util.keystr(path).endswith("['key']['bias']"):  # its gradient is noise
            theirs = functools.reduce(lambda tree, key: tree[key.key], path, expected)
            np.testing.assert_allclose(leaf, theirs, atol=1e-3, err_msg=str(path))


def test_two_processes_are_one_program(tmp_path):
    """Training and evaluation, against one process with twice the devices."""
    two, one = tmp_path / "two", tmp_path / "one"
    short = (*QUICK, "--config.total_steps=20", "--config.mesh.fsdp=2")
    stdout, _ = finish(launch("train.py", *short, f"--workdir={two}"))
    assert stdout.count("Test accuracy") == 1  # the first process speaks for all
    config = digits.get_config("quick")
    config.update(checkpoint_every_steps=20, total_steps=20)
    config.mesh.fsdp = 2
    train.train(config, one)
    assert_close(two, one)
    assert json.loads((two / "config.json").read_text()) == json.loads(
        (one / "config.json").read_text()
    )
    evaluated, _ = finish(launch("evaluate.py", f"--workdir={two}", "--json"))
    lines = [line for line in evaluated.splitlines() if line.startswith("{")]
    assert len(lines) == 1
    assert json.loads(lines[0]) == pytest.approx(evaluate.evaluate(one), rel=1e-3)


FEEDING = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import jax, numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from vit_jax.parallel import distributed, sharding
address, _, process = (argument.partition("=")[2] for argument in sys.argv[1:4])
distributed.start(address, 2, int(process))
for places, axes, seen in (
    ([0, 2, 1, 3], (4, 1, 1), ((0, 2), (1, 3))),  # a torus may lie so
    ([0, 1, 2, 3], (2, 2, 1), ((0, 1), (2, 3))),
    ([0, 2, 1, 3], (2, 1, 2), ((0, 1), (0, 1))),  # both hold a part of every example's model
):
    mesh = Mesh(np.array(jax.devices())[places].reshape(axes), meshes.AXES)
    parts = meshes.num_shards(mesh)
    rows = feeding.process_rows(mesh, parts)["rows"]
    assert tuple(rows) == seen[jax.process_index()], (axes, rows)
    (batch,) = feeding.to_devices([dict(x=rows)], mesh)
    for shard in batch["x"].addressable_shards:
        assert shard.data == np.arange(parts)[shard.index]
print("fed", flush=True)
"""


def test_every_device_gets_its_examples(tmp_path):
    """Also where the mesh doesn't follow the processes, and where they share examples."""
    (tmp_path / "feeding.py").write_text(FEEDING)
    stdout, _ = finish(launch(str(tmp_path / "feeding.py")))
    assert stdout.count("fed") == 2


@pytest.mark.slow
def test_tensor_parallelism_over_processes(tmp_path):
    two, one = tmp_path / "two", tmp_path / "one"
    short = (*QUICK, "--config.total_steps=20")
    finish(launch("train.py", *short, "--config.mesh.tensor=4", f"--workdir={two}"))
    finish(alone(*short, f"--workdir={one}"))
    assert_close(two, one)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_run_that_is_asked_to_stop_saves_and_goes_on(number, tmp_path):
    """Alone; the finished run has the bits of one that wasn't stopped."""
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    arguments = (*QUICK, "--config.log_every_steps=5")
    finish(alone(*arguments, f"--workdir={whole}", devices=1))
    process = alone(*arguments, f"--workdir={stopped}", devices=1)
    wait_for(stopped / "train.log", "step 5/60", process)
    process.send_signal(number)
    _, stderr = finish(process, code=75)
    step = int(re.search(r"Stopped after step (\d+), saved", stderr)[1])
    assert (stopped / "checkpoints" / str(step)).is_dir()
    stdout, _ = finish(alone(*arguments, f"--workdir={stopped}", devices=1))
    assert f"Resuming at step {step} of 60" in stdout
    assert_same_run(stopped, whole)


@pytest.mark.slow
def test_stopped_together_and_started_on_other_processes(tmp_path):
    """SIGTERM to one of two; then on one process and another mesh; then on four."""
    workdir, whole = tmp_path / "run", tmp_path / "whole"
    finish(alone(*QUICK, f"--workdir={whole}"))
    process = launch("train.py", *QUICK, "--config.mesh.fsdp=4", f"--workdir={workdir}")
    wait_for(workdir / "train.log", "step 10/60", process)
    pids = children(process.pid)
    os.kill(pids[1], signal.SIGTERM)
    _, stderr = finish(process, code=75)
    steps = set(re.findall(r"Stopped after step (\d+)", stderr))
    assert len(steps) == 1  # that all agreed on

    process = alone(*QUICK, "--config.mesh.tensor=2", f"--workdir={workdir}", devices=2)
    wait_for(workdir / "train.log", f"Resuming at step {min(steps)} of 60", process)
    wait_for(workdir / "train.log", "step 40/60", process)
    process.send_signal(signal.SIGINT)
    finish(process, code=75)

    finish(launch("train.py", *QUICK, f"--workdir={workdir}", processes=4, devices=1))
    assert_close(workdir, whole)


@pytest.mark.slow
def test_a_process_that_dies_does_not_leave_the_other_hanging(tmp_path):
    """kill -9 of one of two: the other ends in bounded time; both again give the same bits."""
    workdir, whole = tmp_path / "run", tmp_path / "whole"
    finish(launch("train.py", *QUICK, f"--workdir={whole}"))
    arguments = ("train.py", *QUICK, "--heartbeat_seconds=10", f"--workdir={workdir}")
    process = launch("--grace=120", *arguments)
    wait_for(workdir / "train.log", "step 30/60", process)
    os.kill(children(process.pid)[1], signal.SIGKILL)
    start = time.monotonic()
    _, stderr = process.communicate(timeout=120)
    assert process.returncode != 0
    assert time.monotonic() - start < 60
    assert re.search(r"tasks are unhealthy[^\n]*\n1\n", stderr)  # by whom it was left
    stdout, _ = finish(launch(*arguments))
    assert "Resuming at step" in stdout
    assert soak.rows(workdir) == soak.rows(whole)
    jax.tree.map(
        np.testing.assert_array_equal,
        checkpoint.restore_params(workdir)[1],
        checkpoint.restore_params(whole)[1],
    )


@pytest.mark.slow
@pytest.mark.parametrize("part", ["*", "ocdbt.process_1/**/*"])
def test_a_damaged_checkpoint_of_several_processes(tmp_path, part):
    """All fall back to the one before, together, whether or not each can read its own part."""
    finish(launch("train.py", *QUICK, "--config.mesh.fsdp=4", f"--workdir={tmp_path}"))
    newest = tmp_path / "checkpoints" / "60" / "params"
    for path in newest.rglob(part):
        if path.is_file() and path.stat().st_size > 1000:
            path.write_bytes(path.read_bytes()[:100])
    process = launch("train.py", *QUICK, "--config.mesh.fsdp=4", f"--workdir={tmp_path}")
    stdout, stderr = finish(process)
    assert "can't be read" in stderr
    assert "Resuming at step 40 of 60" in stdout
    assert (tmp_path / "damaged_checkpoints" / "60").is_dir()
    assert (tmp_path / "checkpoints" / "60").is_dir()


@pytest.mark.slow
def test_a_mistake_that_one_process_finds_ends_all(tmp_path):
    """With its own code, soon: not in a shutdown that waits for the others."""
    for split, count in (("train", 64), ("val", 8)):
        for i in range(count):
            path = tmp_path / "images" / split / f"class{i % 2}" / f"{i:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((16, 16), i, np.uint8)).save(path)
    (tmp_path / "images" / "train" / "class0" / "00.png").write_text("not an image")
    process = launch(
        "--grace=60",
        "train.py",
        *QUICK,
        f"--config.dataset.name={tmp_path / 'images'}",
        "--config.dataset.eval_split=val",
        "--heartbeat_seconds=10",
        f"--workdir={tmp_path / 'run'}",
    )
    start = time.monotonic()
    _, stderr = finish(process, code=2)
    assert time.monotonic() - start < 90
    assert "00.png can't be" in stderr


@pytest.mark.slow
def test_folders_that_are_not_shared_are_noticed(tmp_path):
    address = f"--coordinator_address=localhost:{local.free_port()}"
    arguments = [address, "--num_processes=2"]
    both = [
        alone(*QUICK, *arguments, f"--process_id={i}", f"--workdir={tmp_path / str(i)}")
        for i in range(2)
    ]
    for process in both:
        _, stderr = finish(process, code=2)
        assert "isn't the same folder for all processes" in stderr


def test_a_run_that_is_killed_now_and_then(tmp_path):
    """A short one of tests/soak.py."""
    assert soak.soak(tmp_path, kills=2, num_steps=100, longest=0.4) == 2


def children(pid: int) -> list[int]:
    """The processes that launch/local.py started, in their order."""
    listed = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in listed.split()]


STOPPING = f"""
import os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
import jax.numpy as jnp
from launch import local
from vit_jax.parallel import distributed, preemption
from vit_jax.runs import checkpoint
from vit_jax.training import train_state
points, step = map(int, sys.argv[2:])

def ask():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(3)  # until JAX has settled where to stop

distributed.start(f"localhost:{{local.free_port()}}", 1, 0)
weights = dict(w=jnp.ones(2))
state = train_state.TrainState(jnp.int32(step), weights, weights, None, jnp.int32(0))
checkpoints = checkpoint.Checkpoints(sys.argv[1])
if not points:
    ask()
with preemption.Preemption() as asked:
    for _ in range(points):
        assert not asked.sync()
    checkpoints.save(step, state)
    checkpoints.finish_saving()
    if points:
        ask()
    deadline = time.monotonic() + 30
    while not asked.sync() and time.monotonic() < deadline:
        time.sleep(0.1)
print("stopped" if asked.reached else "went on", asked.points - points, flush=True)
"""


@pytest.mark.parametrize(("points", "step"), [(100, 60), (5, 300), (0, 0)])
def test_a_save_does_not_move_the_stop(points, step, tmp_path):
    """Where evaluations put the points ahead of the steps, an earlier start the steps; or as the
    run begins."""
    command = [sys.executable, "-c", STOPPING, tmp_path / "run", str(points), str(step)]
    done = subprocess.run(command, env=ONE_DEVICE, capture_output=True, text=True, timeout=120)
    assert done.stdout == "stopped 1\n", done.stdout + done.stderr


def test_a_script_that_saves_nothing_ends_when_asked(tmp_path):
    """Also where a cluster is: JAX takes SIGTERM there for a notice, which only a run looks at."""
    code = f"import sys, time; sys.path.insert(0, {str(ROOT)!r})\n"
    code += "from launch import local; from vit_jax import distributed\n"
    code += "distributed.start(f'localhost:{local.free_port()}', 1, 0, preemptible=False)\n"
    code += "print('joined', flush=True); time.sleep(60)"
    options = dict(env=ONE_DEVICE, stdout=subprocess.PIPE, text=True)
    process = subprocess.Popen([sys.executable, "-c", code], **options)
    assert process.stdout.readline() == "joined\n"
    process.terminate()
    assert process.wait(timeout=30) == -signal.SIGTERM


def test_mistakes_about_processes(monkeypatch):
    with pytest.raises(UserError, match="go together: --num_processes and --process_id are missi"):
        distributed.start(coordinator_address="localhost:1")
    with pytest.raises(UserError, match="--process_id is missing"):
        distributed.start("localhost:1", 2)
    with pytest.raises(UserError, match="--process_id=5 isn't one of 2, counted from 0"):
        distributed.start("localhost:1", 2, 5)
    with pytest.raises(UserError, match="localhost isn't host:port"):
        distributed.start("localhost", 2, 1)
    monkeypatch.setattr(distributed, "JOIN_SECONDS", 1)
    with pytest.raises(UserError, match=r"Process 1 can't join localhost:1 .*is process 0 running"):
        distributed.start("localhost:1", 2, 1)


def test_whose_fault_an_error_is():
    """Another process is gone, or this one failed: by what XLA, Gloo and NCCL say."""
    for text in (
        "UNAVAILABLE: failed to connect to all addresses",
        "DEADLINE_EXCEEDED: Barrier timed out",
        "FAILED_PRECONDITION: Buffer Definition Event: Gloo all-reduce failed: "
        "[external/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [::1]:3283",
        "INTERNAL: NCCL operation ncclAllReduce failed: remote process exited or there was a "
        "network error",
    ):
        assert command_line.GONE.search(text)
    for text in (
        "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 123 bytes",
        "INTERNAL: NCCL operation ncclCommInitRankConfig failed: unhandled system error",
    ):
        assert not command_line.GONE.search(text)
