"""The launchers, with fake versions of the commands that a cluster has."""

import os
import pathlib
import stat
import subprocess
import sys

import pytest
import yaml
from whole_runs import HANG_SECONDS, ONE_DEVICE, ROOT


def fake_command(folder: pathlib.Path, name: str, script: str) -> None:
    """Writes a command to a folder that `run` puts on the PATH."""
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\nset -eu\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def run(command, folder, **environment):
    path = f"{folder}:{os.environ['PATH']}"
    env = ONE_DEVICE | {"PATH": path, "JAX_PLATFORMS": "cpu"} | environment
    return subprocess.run(
        command,
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )


# A slice with the hosts a and b, whose home directories are $HOSTS/a and $HOSTS/b.
GCLOUD = """
for argument; do [[ $argument != --command=* ]] || command=${argument#--command=}; done
case "$4" in
    scp) for host in a b; do mkdir -p "$HOSTS/$host"; cp "$5" "$HOSTS/$host/"; done ;;
    ssh)
        for host in a b; do
            mkdir -p "$HOSTS/$host"
            (cd "$HOSTS/$host" && bash -c "$command")
        done
        ;;
esac
"""
# `python3 -m venv .venv` makes an environment whose commands print the host, their own name and
# their arguments.
PYTHON3 = """
mkdir -p .venv/bin
printf '#!/bin/sh\\necho "$(basename "$(dirname "$PWD")") $(basename "$0")" "$@"\\n' \\
    > .venv/bin/python
chmod +x .venv/bin/python && cp .venv/bin/python .venv/bin/pip
"""


def test_tpu_pod_runs_the_command_on_every_host(tmp_path):
    """Hosts get this folder's code and the arguments unchanged; a second script is refused."""
    fake_command(tmp_path, "gcloud", GCLOUD)
    fake_command(tmp_path, "python3", PYTHON3)
    fake_command(tmp_path, "pgrep", "exit 1")
    arguments = ["train.py", "--config=configs/digits.py", "--config.model.patch_size=(4, 2)"]
    arguments += ["--workdir=gs://bucket/runs/digits"]
    hosts = tmp_path / "hosts"
    done = run(["launch/tpu_pod.sh", "slice", "zone", *arguments], tmp_path, HOSTS=str(hosts))
    assert done.returncode == 0, done.stderr
    for host in ("a", "b"):
        assert f"{host} python {' '.join(arguments)}\n" in done.stdout
        assert (hosts / host / "vit_jax" / "vit_jax" / "models" / "vit.py").is_file()
    fake_command(tmp_path, "pgrep", "exit 0")
    done = run(["launch/tpu_pod.sh", "slice", "zone", *arguments], tmp_path, HOSTS=str(hosts))
    assert done.returncode == 2
    assert "A script is already running on this host: stop it first" in done.stderr


# A queued resource of two hosts, which is in one of the states in the file $STATES after another.
QUEUE = """
echo "$4 ${*:5}" >> "$CALLS"
case "$4" in
    describe)
        [[ $* == *value* ]] || exit 0  # the reason of a state, to print
        state=$(head -n 1 "$STATES")
        sed -i 1d "$STATES"
        [[ $state != NONE ]] || { echo "ERROR: NOT_FOUND: no such resource" >&2; exit 1; }
        [[ $state != LOST ]] || { echo "ERROR: no network" >&2; exit 1; }
        echo "$state"
        ;;
    ssh) [[ "$*" != *train.py* ]] || exit "$(head -n 1 "$CODES"; sed -i 1d "$CODES")" ;;
esac
"""
REQUEST = ["--spot", "--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite"]
PREEMPTED = ["NONE", "LOST", "PROVISIONING", "ACTIVE", "SUSPENDED", "SUSPENDED", "NONE", "ACTIVE"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("states", "codes", "code", "actions"),
    [
        (["NONE", "ACTIVE"], [0], 0, ["create", "train", "delete"]),
        (PREEMPTED, [75, 0], 0, ["create", "train", "delete", "create", "train", "delete"]),
        (["ACTIVE", "ACTIVE", "ACTIVE"], [76, 0], 0, ["train", "stop", "train", "delete"]),
        (["ACTIVE"], [2], 2, ["train"]),  # a user's mistake
        (["ACTIVE", "ACTIVE"], [1], 1, ["train"]),
    ],
)
def test_tpu_queue_trains_until_the_run_is_finished(tmp_path, states, codes, code, actions):
    """After a preemption it requests the slices again, with the same arguments."""
    fake_command(tmp_path, "gcloud", QUEUE)
    fake_command(tmp_path, "sleep", "")
    files = {name: tmp_path / name for name in ("STATES", "CODES", "CALLS")}
    files["STATES"].write_text("".join(f"{state}\n" for state in states))
    files["CODES"].write_text("".join(f"{code}\n" for code in codes))
    script = ["train.py", "--config=configs/digits.py", "--workdir=gs://bucket/runs/digits"]
    command = ["launch/tpu_queue.sh", "name", "zone", *REQUEST, "--", *script]
    done = run(command, tmp_path, **{name: str(path) for name, path in files.items()})
    assert done.returncode == code, done.stderr
    text = files["CALLS"].read_text()
    wanted = {
        "train": " ".join(script),
        "stop": "pkill -TERM",
        "create": "create",
        "delete": "dele",
    }
    found = [
        action for line in text.splitlines() for action, part in wanted.items() if part in line
    ]
    assert found == actions
    for line in text.splitlines():
        if line.startswith("create"):
            assert line == f"create name --zone=zone {' '.join(REQUEST)} --node-id=name"
        if line.startswith(("ssh", "scp")):
            assert "--zone=zone --node=all --worker=all" in text
    assert ("is kept" in done.stderr) == (code != 0)


def test_tpu_queue_requests_several_slices(tmp_path):
    fake_command(
        tmp_path, "gcloud", '[[ $4 != describe ]] || echo NOT_FOUND; echo "$@" >&2; exit 1'
    )
    command = ["launch/tpu_queue.sh", "name", "zone", "--node-count=2", "--", "train.py"]
    done = run(command, tmp_path)
    assert done.returncode == 2
    assert "create name --zone=zone --node-count=2 --node-prefix=name\n" in done.stderr
    done = run(["launch/tpu_queue.sh", "name", "zone", "--node-count=2"], tmp_path)
    assert done.returncode == 2
    assert "launch/tpu_queue.sh NAME ZONE --spot" in done.stderr


def test_gke_file_passes_a_bucket_through():
    """Every host gets the command as it is written, and no volume is needed."""
    (jobset,) = yaml.safe_load_all((ROOT / "launch" / "gke_jobset.yaml").read_text())
    (hosts,) = jobset["spec"]["replicatedJobs"]
    job = hosts["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"][:2] == ["python", "train.py"]
    assert "--workdir=gs://BUCKET/runs/vit_b16" in container["command"]
    assert "volumes" not in pod
    assert job["parallelism"] == job["completions"] == 4
    assert hosts["replicas"] == 1
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    (toleration,) = pod["tolerations"]
    assert toleration["key"] == "cloud.google.com/gke-spot"


def test_tpu_pod_shows_its_usage(tmp_path):
    done = run(["launch/tpu_pod.sh", "slice"], tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("Runs a script on every host")
    assert "launch/tpu_pod.sh NAME ZONE train.py" in done.stderr
    assert "Ctrl-C by itself" not in done.stderr  # a comment further down


def test_tpu_pod_stop_waits_until_nothing_runs_on_any_host(tmp_path):
    """Without waiting, the next start would find the TPU in use."""
    fake_command(tmp_path, "gcloud", GCLOUD)
    fake_command(tmp_path, "pkill", 'echo pkill "$1"')
    fake_command(tmp_path, "sleep", "")
    calls = tmp_path / "calls"
    # On each host the third call finds nothing.
    fake_command(tmp_path, "pgrep", f"echo >> {calls}; (($(wc -l < {calls}) % 3))")
    hosts = str(tmp_path / "hosts")
    done = run(["launch/tpu_pod.sh", "slice", "zone", "stop"], tmp_path, HOSTS=hosts)
    assert (done.returncode, done.stdout) == (0, "pkill -TERM\n" * 2)
    assert len(calls.read_text()) == 6


# Two tasks on one machine; like the real srun, returns the highest exit code.
SRUN = """
export SLURM_STEP_NODELIST=localhost SLURM_NTASKS=2 SLURM_STEP_NUM_NODES=1
for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & pids="${pids:-} $!"; done
highest=0
for pid in $pids; do wait "$pid" || { code=$?; ((code <= highest)) || highest=$code; }; done
exit $highest
"""


@pytest.fixture
def requeued(tmp_path):
    """Fakes srun and scontrol; returns the file that records scontrol's arguments."""
    fake_command(tmp_path, "srun", SRUN)
    fake_command(tmp_path, "scontrol", f'echo "$@" >> {tmp_path}/scontrol_calls')
    return tmp_path / "scontrol_calls"


@pytest.mark.slow
def test_slurm_processes_join_and_train_as_one(tmp_path, requeued):
    workdir = tmp_path / "run"
    short = ["train.py", "--config=configs/digits.py:quick", "--config.total_steps=20"]
    command = ["launch/slurm.sh", *short, f"--workdir={workdir}"]
    done = run(command, tmp_path, SLURM_JOB_ID="77", PYTHON=sys.executable)
    assert done.returncode == 0, done.stderr
    assert "Devices      2 x cpu, mesh data 2" in done.stdout
    assert done.stdout.count("Test accuracy") == 1
    assert not requeued.exists()


@pytest.mark.parametrize(
    ("codes", "code", "is_requeued"),
    [
        ((75, 75), 75, True),
        ((76, 137), 137, True),
        ((0, 2), 2, False),
        ((2, 134), 2, False),  # one process finds a user error, and the other loses it
        ((76, 1), 1, False),
        ((130, 130), 130, False),
    ],
)
def test_slurm_requeues_jobs_that_can_resume(tmp_path, requeued, codes, code, is_requeued):
    fake_command(
        tmp_path, "python", f"codes=({codes[0]} {codes[1]}); exit ${{codes[$SLURM_PROCID]}}"
    )
    job = str(os.getpid())
    environment = dict(SLURM_JOB_ID=job, PYTHON=str(tmp_path / "python"))
    done = run(["launch/slurm.sh", "train.py"], tmp_path, **environment)
    assert done.returncode == code
    assert requeued.exists() == is_requeued
    assert not (ROOT / f".slurm_{job}_failed").exists()


def test_slurm_forwards_sigterm_to_the_script(tmp_path, requeued):
    """The exit code is the script's own."""
    started = tmp_path / "started"
    wait = f"until [[ -e {started} ]]; do sleep 0.05; done"
    fake_command(tmp_path, "srun", f'"$@" & task=$!; {wait}; kill -TERM $task; wait $task')
    fake_command(
        tmp_path,
        "python",
        f"trap 'exit 75' TERM; touch {started}; for i in {{1..100}}; do sleep 0.1; done",
    )
    environment = dict(SLURM_JOB_ID="77", PYTHON=str(tmp_path / "python"))
    done = run(["launch/slurm.sh", "train.py"], tmp_path, **environment)
    assert done.returncode == 75
    assert requeued.read_text() == "requeue 77\n"
