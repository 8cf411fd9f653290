"""The launchers, with stand-ins for what a cluster has."""

import os
import pathlib
import stat
import subprocess
import sys

import pytest
from whole_runs import ONE_DEVICE, ROOT


def stand_in(folder: pathlib.Path, name: str, script: str) -> None:
    """A command of that name in a folder for PATH."""
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\nset -eu\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def run(command, folder, **environment):
    path = f"{folder}:{os.environ['PATH']}"
    env = ONE_DEVICE | {"PATH": path, "JAX_PLATFORMS": "cpu"} | environment
    return subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False
    )


GCLOUD = """
for last; do :; done
case "$4" in
    scp) for host in a b; do mkdir -p "$HOSTS/$host"; cp "$5" "$HOSTS/$host/"; done ;;
    ssh)
        for host in a b; do
            mkdir -p "$HOSTS/$host"
            (cd "$HOSTS/$host" && bash -c "${last#--command=}")
        done
        ;;
esac
"""
# Instead of an environment: one that tells what is called in it, and where.
PYTHON3 = """
mkdir -p .venv/bin
printf '#!/bin/sh\\necho "$(basename "$(dirname "$PWD")") $(basename "$0")" "$@"\\n' \\
    > .venv/bin/python
chmod +x .venv/bin/python && cp .venv/bin/python .venv/bin/pip
"""


def test_tpu_pod(tmp_path):
    """All hosts get the code, and run the command, its arguments as they were given."""
    stand_in(tmp_path, "gcloud", GCLOUD)
    stand_in(tmp_path, "python3", PYTHON3)
    stand_in(tmp_path, "pgrep", "exit 1")
    arguments = ["train.py", "--config=configs/digits.py", "--config.model.patch_size=(4, 2)"]
    hosts = tmp_path / "hosts"
    done = run(["launch/tpu_pod.sh", "slice", "zone", *arguments], tmp_path, HOSTS=str(hosts))
    assert done.returncode == 0, done.stderr
    for host in ("a", "b"):
        assert f"{host} python {' '.join(arguments)}\n" in done.stdout
        assert (hosts / host / "vit_jax" / "vit_jax" / "models" / "vit.py").is_file()
    stand_in(tmp_path, "pgrep", "exit 0")
    done = run(["launch/tpu_pod.sh", "slice", "zone", *arguments], tmp_path, HOSTS=str(hosts))
    assert done.returncode == 2
    assert "A script is running here: stop it first" in done.stderr
    done = run(["launch/tpu_pod.sh", "slice"], tmp_path)
    assert done.returncode == 2
    assert "launch/tpu_pod.sh NAME ZONE train.py" in done.stderr


def test_tpu_pod_stop_waits(tmp_path):
    """Until nothing runs on any host: the next start would find its TPU taken."""
    stand_in(tmp_path, "gcloud", GCLOUD)
    stand_in(tmp_path, "pkill", 'echo told "$1"')
    looks = tmp_path / "looks"  # the third one of a host finds nothing any more
    stand_in(tmp_path, "pgrep", f"echo >> {looks}; (($(wc -l < {looks}) % 3))")
    hosts = str(tmp_path / "hosts")
    done = run(["launch/tpu_pod.sh", "slice", "zone", "stop"], tmp_path, HOSTS=hosts)
    assert (done.returncode, done.stdout) == (0, "told -TERM\n" * 2)
    assert len(looks.read_text()) == 6


SRUN = """
export SLURM_STEP_NODELIST=localhost SLURM_NTASKS=2 SLURM_STEP_NUM_NODES=1
for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & pids="${pids:-} $!"; done
code=0
for pid in $pids; do wait "$pid" || { got=$?; ((got <= code)) || code=$got; }; done
exit $code
"""


@pytest.mark.slow
def test_slurm(tmp_path):
    """Two processes find each other by what Slurm tells them, and train as one."""
    stand_in(tmp_path, "srun", SRUN)
    stand_in(tmp_path, "scontrol", f'echo "$@" >> {tmp_path}/asked')
    workdir = tmp_path / "run"
    short = ["train.py", "--config=configs/digits.py:quick", "--config.total_steps=20"]
    command = ["launch/slurm.sh", *short, f"--workdir={workdir}"]
    done = run(command, tmp_path, SLURM_JOB_ID="77", PYTHON=sys.executable)
    assert done.returncode == 0, done.stderr
    assert "Devices      2 x cpu, mesh data 2" in done.stdout
    assert done.stdout.count("Test accuracy") == 1
    assert not (tmp_path / "asked").exists()


@pytest.mark.parametrize(
    ("codes", "code", "requeued"),
    [
        ((75, 75), 75, True),
        ((76, 137), 137, True),
        ((0, 2), 2, False),
        ((2, 134), 2, False),  # a mistake that one process finds: the other loses it
        ((76, 1), 1, False),
        ((130, 130), 130, False),
    ],
)
def test_slurm_queues_what_was_stopped_again(tmp_path, codes, code, requeued):
    stand_in(tmp_path, "srun", SRUN)
    stand_in(tmp_path, "scontrol", f'echo "$@" >> {tmp_path}/asked')
    stand_in(tmp_path, "python", f"codes=({codes[0]} {codes[1]}); exit ${{codes[$SLURM_PROCID]}}")
    job = str(os.getpid())
    given = dict(SLURM_JOB_ID=job, PYTHON=str(tmp_path / "python"))
    done = run(["launch/slurm.sh", "train.py"], tmp_path, **given)
    assert done.returncode == code
    assert (tmp_path / "asked").exists() == requeued
    assert not (ROOT / f".slurm_{job}_failed").exists()


def test_slurm_tells_the_processes_to_stop(tmp_path):
    """SIGTERM to a task is one to its script, whose exit code counts."""
    stand_in(tmp_path, "srun", '"$@" & task=$!; sleep 1; kill -TERM $task; wait $task')
    stand_in(tmp_path, "scontrol", f'echo "$@" >> {tmp_path}/asked')
    stand_in(tmp_path, "python", "trap 'exit 75' TERM; for i in {1..100}; do sleep 0.1; done")
    given = dict(SLURM_JOB_ID="77", PYTHON=str(tmp_path / "python"))
    done = run(["launch/slurm.sh", "train.py"], tmp_path, **given)
    assert done.returncode == 75
    assert (tmp_path / "asked").read_text() == "requeue 77\n"
