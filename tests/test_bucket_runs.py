"""Whole runs in a bucket, of a server on this machine: kills, faults, several processes."""

import os
import signal
import subprocess
import time

import pytest
from PIL import Image
from whole_runs import (
    HANG_SECONDS,
    ONE_DEVICE,
    QUICK,
    ROOT,
    assert_same_checkpoint,
    assert_same_run,
    command,
    quick_config,
    steps_in,
)

import evaluate
import train
from vit_jax import checkpoint, pretrained
from vit_jax.inference.classifier import Classifier
from vit_jax.logs import run_log
from vit_jax.storage.files import open_path

slow = pytest.mark.slow
RUN = "gs://bar/run"
ARGS = (*QUICK, f"--workdir={RUN}")


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory):
    """A finished quick run, on this machine's disk."""
    workdir = tmp_path_factory.mktemp("on_disk")
    result = start(*QUICK, f"--workdir={workdir}").finish()
    assert result.returncode == 0, result.stderr
    return workdir


class Started(subprocess.Popen):
    """A script in a process of its own, with the environment as it is now."""

    def finish(self) -> subprocess.CompletedProcess:
        stdout, stderr = self.communicate(timeout=HANG_SECONDS)
        return subprocess.CompletedProcess(self.args, self.returncode, stdout, stderr)


def start(*args, script="train.py") -> Started:
    environment = {**os.environ, "XLA_FLAGS": ONE_DEVICE["XLA_FLAGS"]}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = Started(
        command(*args, script=script), cwd=ROOT, env=environment, start_new_session=True, **pipes
    )
    STARTED.append(process)
    return process


STARTED = []


@pytest.fixture(autouse=True)
def none_left():
    """Kills what a failed test has left: it would go on to write to the next test's bucket."""
    yield
    while STARTED:
        if (process := STARTED.pop()).poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def read_until(process: Started, text: str) -> None:
    for line in process.stdout:
        if line.startswith(text):
            return
    pytest.fail(process.finish().stderr)


def wait_for_checkpoint(bucket, process: Started) -> None:
    """Waits until the checkpoint of step 20 is complete."""
    while not any(name.endswith("20/commit_success.txt") for name in bucket.names("run/")):
        assert process.poll() is None, process.finish().stderr
        time.sleep(0.01)


def test_a_run_in_a_bucket_is_the_run_on_a_disk(bucket, tmp_path, on_one_device):
    """Trained, stopped and resumed, evaluated, loaded and converted."""
    config = quick_config(total_steps=20, eval_every_steps=10, checkpoint_every_steps=10)
    train.train(config, tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Preemption, "sync", lambda preemption: stop_after(preemption, 10))
        with pytest.raises(train.Preempted):
            train.train(config, RUN)
    train.train(config, RUN)
    assert_same_run(open_path(RUN), tmp_path)

    page = evaluate.report(RUN)
    run_log.stop_logging()
    assert page.read_text().startswith("<!DOCTYPE html>")
    names = bucket.names("run/")
    assert "run/.lock" not in names
    for name in ("config.json", "class_names.json", "train.log", "evaluation/confusion.png"):
        assert f"run/{name}" in names
    assert sum("tfevents" in name for name in names) == 3  # two starts, and the evaluation
    loaded = Classifier.load(f"{RUN}/checkpoints/20")
    pretrained.save(loaded.params, "gs://bar/timm", "timm", model=loaded.model)
    assert Classifier.load("gs://bar/timm").model.depth == 1
    log = bucket.read("run/train.log").decode()
    assert log.count("step 10/20  loss") == 1
    assert "Resuming at step 10 of 20" in log


def stop_after(preemption, moment: int) -> bool:
    preemption.sync_points += 1
    preemption.stopping = preemption.sync_points >= moment
    return preemption.stopping


@slow
@pytest.mark.parametrize(
    ("faults", "workdir", "message"),
    [
        ({}, "gs://foo/run", "gs://foo/run can't be used: there is no such bucket"),
        ({"denied": 401}, RUN, "gs://bar/run can't be used: the credentials are missing or wrong"),
        ({"read_only": True}, RUN, "gs://bar/run can't be used: the account may not read and"),
    ],
)
def test_mistakes_stop_before_training(bucket, faults, workdir, message):
    vars(bucket.faults).update(faults)
    result = start(*QUICK, f"--workdir={workdir}").finish()
    assert result.returncode == 2
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if "google_auth" not in line]
    assert len(lines) == 1
    assert lines[0].startswith(message)


@slow
def test_a_killed_run_resumes_to_the_bit_and_keeps_others_out(bucket, on_disk):
    first = start(*ARGS)
    read_until(first, "step 10/60")
    first.send_signal(signal.SIGSTOP)
    second = start(*ARGS).finish()
    first.send_signal(signal.SIGCONT)
    assert second.returncode == 2
    assert f"Another program trains in {RUN}: process {first.pid} on " in second.stderr
    wait_for_checkpoint(bucket, first)
    first.send_signal(signal.SIGKILL)
    first.wait()
    result = start(*ARGS).finish()
    assert result.returncode == 0, result.stderr
    assert "Resuming at step" in result.stdout
    assert_same_run(open_path(RUN), on_disk)


@slow
def test_faults_are_overcome_and_said_once(bucket, on_disk):
    bucket.faults.error_every, bucket.faults.drop_every = 10, 13
    result = start(*ARGS).finish()
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("the request is repeated") == 1
    assert bucket.num_faults > 10
    bucket.faults.error_every = bucket.faults.drop_every = 0
    assert_same_run(open_path(RUN), on_disk)


@slow
def test_a_bucket_that_is_gone_does_not_stop_training(bucket, on_disk):
    """The run trains to its end, and ends with one line; once the bucket is back, it resumes."""
    process = start(*ARGS)
    wait_for_checkpoint(bucket, process)
    kept = steps_in(open_path(RUN))
    bucket.faults.is_gone = True
    result = process.finish()  # TensorStore's 32 attempts can take a quarter of an hour
    assert result.returncode == 75
    assert "step 60/60  evaluation" in result.stdout
    assert "Still waiting to write the logs in gs://bar/run" in result.stderr
    assert "The run continues, and tries again" in result.stderr
    assert "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()
    assert any("The last checkpoint, of step 60, couldn't be written to" in line for line in last)
    bucket.faults.is_gone = False
    assert steps_in(open_path(RUN)) >= kept
    assert start(*ARGS).finish().returncode == 0
    assert_same_run(open_path(RUN), on_disk)


@slow
def test_a_damaged_checkpoint_is_set_aside(bucket, on_disk):
    assert start(*ARGS).finish().returncode == 0
    for name, stored in bucket.objects.items():
        if name.startswith("run/checkpoints/60/params/") and "/d/" in name:
            stored.content = stored.content[: len(stored.content) // 2]
    result = start(*ARGS).finish()
    assert result.returncode == 0
    assert "Moved checkpoint 60 to gs://bar/run/corrupt_checkpoints/60" in result.stderr
    assert_same_run(open_path(RUN), on_disk)


@slow
def test_a_branch_of_a_run_in_a_bucket(bucket, on_disk):
    """With nothing changed, it has the bits of the run that it left."""
    assert start(*ARGS).finish().returncode == 0
    source = f"--config.init_from={RUN}/checkpoints/40"
    branch = "gs://bar/branch"
    args = (*QUICK, source, "--config.init_mode=continue", f"--workdir={branch}")
    result = start(*args).finish()
    assert result.returncode == 0, result.stderr
    assert f"Branch       of {RUN}, step 40" in result.stdout
    assert_same_checkpoint(open_path(branch), on_disk, 60)


@slow
def test_two_processes(bucket, tmp_path):
    """Killed while training, both resume; the numbers are those of two processes on a disk."""
    args = ("--num_processes=2", "train.py", *QUICK, "--config.mesh.fsdp=2")
    script = "launch/local.py"
    assert start(*args, f"--workdir={tmp_path}", script=script).finish().returncode == 0
    process = start(*args, f"--workdir={RUN}", script=script)
    wait_for_checkpoint(bucket, process)
    process.send_signal(signal.SIGTERM)
    assert process.finish().returncode == 75
    result = start(*args, f"--workdir={RUN}", script=script).finish()
    assert result.returncode == 0, result.stderr
    for step in set(steps_in(open_path(RUN))) - set(steps_in(tmp_path)):
        (open_path(RUN) / "checkpoints" / str(step)).rmtree()  # where it was stopped
    assert_same_run(open_path(RUN), tmp_path)


@slow
def test_a_folder_of_images_in_a_bucket(bucket, image_folder, tmp_path, on_one_device):
    """Has the examples, the order and the fingerprint of the folder on a disk."""
    for path in image_folder.rglob("*"):
        if path.is_file():
            name = f"images/{path.relative_to(image_folder)}"
            bucket.write(name, path.read_bytes(), {})
    config = quick_config(total_steps=12, batch_size=8)
    config.dataset.update(name=str(image_folder), eval_split="val", channels=3)
    train.train(config, tmp_path / "run")
    config.dataset.name = "gs://bar/images"
    train.train(config, tmp_path / "from_bucket")
    assert_same_run(tmp_path / "from_bucket", tmp_path / "run")
    first, _ = checkpoint.restore_params(tmp_path / "run")
    second, _ = checkpoint.restore_params(tmp_path / "from_bucket")
    assert first.dataset.fingerprint == second.dataset.fingerprint
    train.train(config, tmp_path / "run")  # resumes: the data are the same, elsewhere


@slow
def test_a_corrupt_image_in_a_bucket_is_named(bucket, on_one_device, tmp_path):
    for i in range(8):
        image = tmp_path / "image.png"
        Image.new("L", (20, 20), i).save(image)
        for split in ("train", "test"):
            bucket.write(f"images/{split}/{i % 2}/{i}.png", image.read_bytes(), {})
    bucket.write("images/train/0/2.png", b"damaged", {})
    config = quick_config(total_steps=12, batch_size=8)
    config.dataset.name = "gs://bar/images"
    with pytest.raises(train.UserError, match=r"gs://bar/images/train/0/2.png can't be decoded"):
        train.train(config, tmp_path / "run")
