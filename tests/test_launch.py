"""The launchers, with stand-ins for what a cluster has."""

import os
import pathlib
import stat
import subprocess
import sys

import pytest
from runs import ONE_DEVICE, ROOT


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
    ssh) for host in a b; do (cd "$HOSTS/$host" && bash -c "${last#--command=}"); done ;;
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
    arguments = ["train.py", "--config=configs/digits.py", "--config.model.patch_size=(4, 2)"]
    hosts = tmp_path / "hosts"
    done = run(["launch/tpu_pod.sh", "slice", "zone", *arguments], tmp_path, HOSTS=str(hosts))
    assert done.returncode == 0, done.stderr
    for host in ("a", "b"):
        assert f"{host} python {' '.join(arguments)}\n" in done.stdout
        assert (hosts / host / "vit_jax" / "vit_jax" / "models" / "vit.py").is_file()
    done = run(["launch/tpu_pod.sh", "slice"], tmp_path)
    assert done.returncode == 2
    assert "launch/tpu_pod.sh NAME ZONE train.py" in done.stderr


SRUN = """
export SLURM_STEP_NODELIST=localhost SLURM_NTASKS=2 SLURM_STEP_NUM_NODES=1
for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & pids="${pids:-} $!"; done
code=0
for pid in $pids; do wait "$pid" || code=$?; done
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
    ("code", "asked"), [(75, "requeue 77\n"), (137, "requeue 77\n"), (2, ""), (1, ""), (130, "")]
)
def test_slurm_queues_what_was_stopped_again(tmp_path, code, asked):
    stand_in(tmp_path, "srun", f"exit {code}")
    stand_in(tmp_path, "scontrol", f'echo "$@" >> {tmp_path}/asked')
    done = run(["launch/slurm.sh", "train.py"], tmp_path, SLURM_JOB_ID="77")
    assert done.returncode == code
    assert asked == ((tmp_path / "asked").read_text() if (tmp_path / "asked").exists() else "")
