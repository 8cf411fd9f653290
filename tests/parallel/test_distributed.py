"""Several processes as one program, over CPU collectives."""

import json
import os
import re
import shutil
import signal
import time

import forked
import jax
import numpy as np
import pytest
import soak
from PIL import Image
from whole_runs import (
    QUICK,
    assert_same_run,
    one_device_only,
    quick_config,
    untimed_rows,
    wait_for,
)

import evaluate
import train
from command_line import exits
from launch import local
from vit_jax.errors import Preempted, UserError
from vit_jax.parallel import distributed
from vit_jax.paths import path_name
from vit_jax.runs import checkpoint

SHORT = (*QUICK, "--config.total_steps=20", "--config.checkpoint_every_steps=10")


def launch(script, *args, processes=2, devices=2):
    """Starts the processes of a program, each with so many virtual devices."""
    address = f"--coordinator_address=localhost:{local.free_port()}"
    flags = (address, f"--num_processes={processes}")
    return [
        forked.Script(script, *flags, f"--process_id={i}", *args, devices=devices)
        for i in range(processes)
    ]


def finish(scripts, code=0):
    """Returns what the processes of a program printed; all must end with the exit code."""
    results = [script.finish() for script in scripts]
    for result in results:
        assert result.returncode == code, result.stderr
    return results


def run_alone(*args, devices=4):
    """Trains in one process."""
    result = forked.run_script("train.py", *args, devices=devices)
    assert result.returncode == 0, result.stderr
    return result


def params_by_name(workdir) -> dict:
    _, params = checkpoint.restore_params(workdir)
    return {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}


def assert_close(workdir, other):
    """Asserts that two runs agree to float32 rounding."""
    for row, expected_row in zip(untimed_rows(workdir), untimed_rows(other), strict=True):
        assert row == pytest.approx(expected_row, rel=1e-3)
    params, expected = params_by_name(workdir), params_by_name(other)
    assert params.keys() == expected.keys()
    for name in params:
        if not name.endswith("key/bias"):  # softmax ignores it: its gradient is rounding error
            np.testing.assert_allclose(params[name], expected[name], atol=1e-3, err_msg=name)


def short_config():
    config = quick_config(total_steps=20, checkpoint_every_steps=10)
    config.mesh.update(data=-1, fsdp=2)
    return config


@pytest.fixture(scope="module")
def whole(tmp_path_factory, one_device):
    """A short run in this process, on one device."""
    workdir = tmp_path_factory.mktemp("whole")
    with one_device_only(one_device):
        train.train(short_config(), workdir)
    return workdir


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path, whole):
    """In their rows, evaluations included, parameters and recorded configuration."""
    flags = ("--config.mesh.fsdp=2", f"--workdir={tmp_path}")
    results = finish(launch("train.py", *SHORT, *flags))
    assert [result.stdout.count("Test accuracy") for result in results] == [1, 0]
    assert_close(tmp_path, whole)
    recorded, expected = (
        json.loads((run / "config.json").read_text()) for run in (tmp_path, whole)
    )
    assert recorded == expected


@pytest.mark.slow
@pytest.mark.parametrize("tensor", [1, 2])
def test_two_processes_evaluate_as_one(tmp_path, whole, on_one_device, tensor):
    """Each with a part of the batch, or each with a part of the parameters."""
    run, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(whole, run)
    recorded = json.loads((run / "config.json").read_text())
    recorded["mesh"] = {"data": -1, "fsdp": 1, "tensor": tensor}
    (run / "config.json").write_text(json.dumps(recorded))
    flags = ("--json", "--evals=knn", f"--out={out}")
    results = finish(launch("evaluate.py", f"--workdir={run}", *flags))
    lines = "".join(result.stdout for result in results).splitlines()
    (line,) = [line for line in lines if line.startswith("{")]  # Gloo prints too
    values, target = json.loads(line), evaluate.open_run(whole)
    expected = evaluate.evaluate(target, evaluate.parse_evals("knn", target.config))
    assert {name: values[name] for name in expected.metrics} == pytest.approx(
        expected.metrics, rel=1e-3
    )
    assert values["evals"]["knn"] == pytest.approx(expected.evals["knn"], abs=0.01)
    assert json.loads((out / "evaluation.json").read_text()) == values


def test_a_stopped_run_resumes_to_the_bit(tmp_path, whole, on_one_device, monkeypatch):
    """SIGTERM during step 5; tests/parallel/test_preemption.py stops scripts."""

    def record(log, step, values, record=train.run_log.RunLog.record):
        record(log, step, values)
        if step == 5:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(train.run_log.RunLog, "record", record)
        with pytest.raises(Preempted, match="Stopped after step 5, saved"):
            train.train(short_config(), tmp_path)
    assert (tmp_path / "checkpoints" / "5").is_dir()
    train.train(short_config(), tmp_path)
    assert "Resuming at step 5 of 20" in (tmp_path / "train.log").read_text()
    assert_same_run(tmp_path, whole)


FEEDING = """
import sys
import jax, numpy as np
from jax.sharding import Mesh
from vit_jax.parallel import distributed, feeding
from vit_jax.parallel.mesh import AXES, num_shards
address, _, process = (arg.partition("=")[2] for arg in sys.argv[1:4])
distributed.start(address, 2, int(process))
for order, axes, expected in (
    ([0, 2, 1, 3], (4, 1, 1), ((0, 2), (1, 3))),  # as on a torus
    ([0, 1, 2, 3], (2, 2, 1), ((0, 1), (2, 3))),
    ([0, 2, 1, 3], (2, 1, 2), ((0, 1), (0, 1))),  # each process has half of the model
):
    mesh = Mesh(np.array(jax.devices())[order].reshape(axes), AXES)
    shards = num_shards(mesh)
    rows = feeding.process_rows(mesh, shards)["rows"]
    assert tuple(rows) == expected[jax.process_index()], (axes, rows)
    (batch,) = feeding.to_devices([dict(x=rows)], mesh)
    for shard in batch["x"].addressable_shards:
        assert shard.data == np.arange(shards)[shard.index]
"""


@pytest.mark.slow
def test_every_device_gets_its_examples(tmp_path):
    """Also if the mesh interleaves the processes' devices, and if processes share examples."""
    (tmp_path / "feeding.py").write_text(FEEDING)
    finish(launch(str(tmp_path / "feeding.py")))


@pytest.mark.slow
def test_tensor_parallelism_over_processes(tmp_path, whole):
    finish(launch("train.py", *SHORT, "--config.mesh.tensor=4", f"--workdir={tmp_path}"))
    assert_close(tmp_path, whole)


@pytest.mark.slow
def test_stopped_processes_resume_on_other_processes_and_meshes(tmp_path):
    """SIGTERM to one of two; then one process with another mesh, stopped too; then four."""
    workdir, whole = tmp_path / "run", tmp_path / "whole"
    log = workdir / "train.log"
    run_alone(*QUICK, f"--workdir={whole}")
    scripts = launch("train.py", *QUICK, "--config.mesh.fsdp=4", f"--workdir={workdir}")
    wait_for(log, "step 10/60", scripts[0])
    scripts[1].send_signal(signal.SIGTERM)
    results = finish(scripts, code=75)
    steps = {int(re.search(r"Stopped after step (\d+)", r.stderr)[1]) for r in results}
    assert len(steps) == 1  # the processes agreed on it

    flags = (*QUICK, "--config.mesh.tensor=2", f"--workdir={workdir}")
    script = forked.Script("train.py", *flags, devices=2)
    wait_for(log, f"Resuming at step {min(steps)} of 60", script)
    while not re.search(r"Resuming at step .* step \d+/60", log.read_text(), re.DOTALL):
        assert script.poll() is None, script.finish()
        time.sleep(0.01)
    script.send_signal(signal.SIGINT)
    finish([script], code=75)

    finish(launch("train.py", *QUICK, f"--workdir={workdir}", processes=4, devices=1))
    assert_close(workdir, whole)


@pytest.mark.slow
def test_a_process_that_dies_ends_the_other_soon(tmp_path):
    """SIGKILL to one of two; started again, both end with the same bits."""
    workdir, whole = tmp_path / "run", tmp_path / "whole"
    finish(launch("train.py", *QUICK, f"--workdir={whole}"))
    flags = (*QUICK, "--heartbeat_seconds=10", f"--workdir={workdir}")
    scripts = launch("train.py", *flags)
    wait_for(workdir / "train.log", "step 30/60", scripts[0])
    while not (workdir / "checkpoints" / "20").exists():
        assert scripts[0].poll() is None
        time.sleep(0.01)
    scripts[1].send_signal(signal.SIGKILL)
    start = time.monotonic()
    result = scripts[0].finish()
    assert result.returncode != 0
    assert time.monotonic() - start < 60
    assert re.search(r"tasks are unhealthy[^\n]*\n1\n", result.stderr)  # the dead process's index
    assert "Resuming at step" in finish(launch("train.py", *flags))[0].stdout
    assert_same_run(workdir, whole)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["*", "ocdbt.process_1/**/*"])
def test_processes_agree_that_a_checkpoint_is_corrupt(tmp_path, pattern):
    """Even if only one of them can't read its part of it."""
    flags = (*QUICK, "--config.mesh.fsdp=4", f"--workdir={tmp_path}")
    finish(launch("train.py", *flags))
    for path in (tmp_path / "checkpoints" / "60" / "params").rglob(pattern):
        if path.is_file() and path.stat().st_size > 1000:
            os.truncate(path, 100)
    results = finish(launch("train.py", *flags))
    assert "can't be read" in results[0].stderr
    assert "Resuming at step 40 of 60" in results[0].stdout
    assert (tmp_path / "corrupt_checkpoints" / "60").is_dir()
    assert (tmp_path / "checkpoints" / "60").is_dir()


@pytest.mark.slow
def test_a_mistake_that_one_process_finds_ends_all(tmp_path):
    """With its own exit code, and without waiting for the others to shut down."""
    for split, count in (("train", 64), ("val", 8)):
        for i in range(count):
            path = tmp_path / "images" / split / f"class{i % 2}" / f"{i:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((16, 16), i, np.uint8)).save(path)
    (tmp_path / "images" / "train" / "class0" / "00.png").write_text("not an image")
    scripts = launch(
        "train.py",
        *QUICK,
        f"--config.dataset.name={tmp_path / 'images'}",
        "--config.dataset.eval_split=val",
        "--heartbeat_seconds=10",
        f"--workdir={tmp_path / 'run'}",
    )
    start = time.monotonic()
    results = [script.finish() for script in scripts]
    assert time.monotonic() - start < 120
    found = [result.returncode for result in results if "00.png can't be" in result.stderr]
    assert set(found) == {2}
    assert all(result.returncode != 0 for result in results)


@pytest.mark.slow
def test_folders_that_the_processes_do_not_share_are_refused(tmp_path):
    address = f"--coordinator_address=localhost:{local.free_port()}"
    scripts = [
        forked.Script(
            "train.py",
            *(*QUICK, address, "--num_processes=2", f"--process_id={i}"),
            f"--workdir={tmp_path / str(i)}",
        )
        for i in range(2)
    ]
    for result in finish(scripts, code=2):
        assert "isn't the same folder for all processes" in result.stderr


@pytest.mark.slow
def test_a_run_that_is_killed_at_random(tmp_path):
    """A short tests/soak.py."""
    assert soak.soak(tmp_path, kills=2, num_steps=100, max_seconds=0.4) == 2


def test_mistakes_about_processes(monkeypatch):
    with pytest.raises(UserError, match="go together: --num_processes and --process_id are missi"):
        distributed.start(coordinator_address="localhost:1")
    with pytest.raises(UserError, match="--process_id is missing"):
        distributed.start("localhost:1", 2)
    with pytest.raises(UserError, match="--process_id is 5; .* must be between 0 and 1"):
        distributed.start("localhost:1", 2, 5)
    with pytest.raises(UserError, match="--coordinator_address is 'localhost'; .*be host:port"):
        distributed.start("localhost", 2, 1)
    for address in ("localhost:99999", "http://localhost:1234"):
        with pytest.raises(UserError, match=f"is '{address}'; .* a port from 1 to 65535"):
            distributed.start(address, 2, 1)
    monkeypatch.setattr(distributed, "JOIN_SECONDS", 1)
    with pytest.raises(UserError, match=r"Process 1 can't join localhost:1 .*is process 0 running"):
        distributed.start("localhost:1", 2, 1)


@pytest.fixture
def no_cluster(monkeypatch):
    """JAX finds no cluster, and the environment tells of none."""
    for name in {name for names in distributed.MANAGERS.values() for name in names}:
        monkeypatch.delenv(name, raising=False)
    calls = []

    def initialize(**arguments):
        calls.append(arguments)
        raise ValueError("whatever JAX says.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    return calls


def test_whether_processes_join(no_cluster, monkeypatch):
    """Whatever JAX's error says; a cluster manager in the environment makes it an error."""
    distributed.start(mode="off")
    assert not no_cluster
    distributed.start(mode="auto")
    assert len(no_cluster) == 1
    with pytest.raises(UserError, match="--distributed=on, but JAX recognizes no cluster manager"):
        distributed.start(mode="on")
    with pytest.raises(UserError, match="--distributed=off doesn't go with --coordinator_address"):
        distributed.start("localhost:1", 2, 0, mode="off")
    with pytest.raises(UserError, match="The processes can't join: whatever JAX says"):
        distributed.start("localhost:1", 2, 0, mode="auto")
    for name in distributed.MANAGERS["Slurm"]:
        monkeypatch.setenv(name, "1")
    with pytest.raises(UserError, match="can't join under Slurm: whatever JAX says"):
        distributed.start(mode="auto")
    distributed.start(mode="off")


def test_devices_of_hosts_that_have_not_joined_are_refused(no_cluster, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(UserError, match="those of 4 hosts, whose processes haven't joined"):
        distributed.start()


@pytest.mark.slow
def test_distributed_on_the_command_line():
    """JAX's own detection, in a process of its own."""
    result = forked.run_script("train.py", *QUICK, "--distributed=on")
    assert result.returncode == 2
    assert "--distributed=on, but JAX recognizes no cluster manager" in result.stderr
    result = forked.run_script("evaluate.py", "--workdir=x", "--distributed=maybe")
    assert result.returncode == 2
    assert "--distributed=maybe: value should be one of <auto|on|off>" in result.stderr


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        ("UNAVAILABLE: failed to connect to all addresses", True),
        ("DEADLINE_EXCEEDED: Barrier timed out", True),
        (
            "FAILED_PRECONDITION: Buffer Definition Event: Gloo all-reduce failed: [external/gloo/"
            "gloo/transport/tcp/pair.cc:547] Connection closed by peer [::1]:3283",
            True,
        ),
        (
            "INTERNAL: NCCL operation ncclAllReduce failed: remote process exited or there was a "
            "network error",
            True,
        ),
        (
            "INTERNAL: Barrier failed because: task is set to ERROR: UNAVAILABLE: Task 1 heartbeat "
            "timeout. This indicates that the remote task has failed",
            True,
        ),
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 123 bytes", False),
        ("INTERNAL: NCCL operation ncclCommInitRankConfig failed: unhandled system error", False),
    ],
)
def test_errors_that_mean_another_process_is_gone(error, lost):
    """Others are this process's own."""
    assert bool(exits.LOST_PROCESS.search(error)) == lost


def test_a_platform_without_devices_is_named(monkeypatch):
    """JAX raises an AssertionError without a message if its plugin isn't installed."""
    for error, reason in (
        (AssertionError(), "its plugin for them isn't installed"),
        (RuntimeError("Unable to initialize backend 'tpu': no TPU\n..."), "no TPU"),
    ):
        monkeypatch.setattr(jax, "devices", lambda error=error: raise_(error))
        with pytest.raises(UserError, match=rf"{reason}\): unset JAX_PLATFORMS, which is 'cpu'"):
            distributed.check_devices()


def raise_(error):
    raise error
