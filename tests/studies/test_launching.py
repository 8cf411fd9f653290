"""Launches: which cells run, again, in which order, and what becomes of those that fail."""

import dataclasses
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import threading
import time
import types

import pytest
from pages_of_tests import STUDIES, load, write_page
from whole_runs import ONE_DEVICE, ROOT, rows, steps_in

from vit_jax.errors import UserError
from vit_jax.scaling import command
from vit_jax.storage import lease
from vit_jax.studies import cells, launching, pages, showing

FAKE = pathlib.Path(__file__).with_name("fake_train.py")


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A study's folder, in which cells are runs of fake_train.py."""
    monkeypatch.setenv("STARTED", str(tmp_path / "started"))
    monkeypatch.setattr(launching, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(launching, "READ_SECONDS", 0.1)
    return tmp_path / "study"


def started(root) -> list[str]:
    path = root.parent / "started"
    return path.read_text().split() if path.exists() else []


def launch(root, study, workers=2, show=lambda _: None):
    run = launching.Launch(study, root, workers)
    run.script = FAKE
    run.run(show)
    return {name: status.state for name, status in run.status.items()}


def test_finished_cells_are_skipped_and_failed_ones_tried_again(root, tmp_path):
    study = load(tmp_path, {"axes": {"model.depth": (1, 13, 2)}})
    states = {"depth=1": "finished", "depth=13": "failed", "depth=2": "finished"}
    assert launch(root, study) == states
    assert sorted(started(root)) == ["depth=1", "depth=13", "depth=2"]
    failed = cells.status(root, study.cells[1], study)
    assert failed.message == "exit code 1: config.model.depth is 13"
    assert launch(root, study) == states
    assert sorted(started(root)) == ["depth=1", "depth=13", "depth=13", "depth=2"]


def test_stages_follow_each_other(root, tmp_path):
    """The best learning rate is used; what needs a failed cell isn't run, and the rest is."""
    stages = {
        "sweep": {"axes": {"lr": (0.1, 0.01, 0.001), "model.depth": (1, 2)}},
        "broken": {"axes": {"model.depth": (14,)}},
        "final": {"best": "sweep", "over": ("lr",), "set": {"total_steps": 30}},
        "after": {"after": "broken", "set": {"model.depth": 1}},
    }
    study = load(tmp_path, {"stages": stages})
    states = launch(root, study, workers=3)
    assert states["broken/depth=14"] == "failed"
    assert states["after/depth=14"] == "waiting"
    assert states["final/depth=1"] == states["final/depth=2"] == "finished"
    names = started(root)
    for depth in (1, 2):
        sweep = [names.index(f"lr={lr}_depth={depth}") for lr in (0.1, 0.01, 0.001)]
        assert names.index(f"depth={depth}") > max(sweep)
    (last,) = (row for row in rows(root / "final" / "depth=2") if row["step"] == 30)
    assert last["val/accuracy"] == 1 - 1 / 30  # at 0.01


def test_the_best_of_those_that_finished(root, tmp_path, caplog):
    """A candidate that fails is left out by name; without any that finished, nothing is run."""
    stages = {
        "sweep": {"axes": {"model.depth": (13, 1), "lr": (0.1, 0.01)}},
        "final": {"best": "sweep", "over": ("model.depth", "lr"), "set": {"seed": 7}},
        "none": {"axes": {"model.depth": (13, 14)}},
        "never": {"best": "none", "over": ("model.depth",)},
    }
    study = load(tmp_path, {"stages": stages})
    states = launch(root, study)
    assert states["final/run"] == "finished"
    assert states["never/run"] == "waiting"
    assert json.loads((root / "final/run/config.json").read_text())["schedule"]["base_lr"] == 0.01
    left_out = "sweep/depth=13_lr=0.1, sweep/depth=13_lr=0.01, which failed"
    assert f"final/run: the best without {left_out}" in caplog.text
    cells.check_unchanged(root, study)


def test_a_cell_that_cannot_be_read_does_not_end_the_launch(root, tmp_path, caplog, monkeypatch):
    study = load(tmp_path, {"axes": {"model.depth": (1, 2)}})
    known, failures = cells.status, []

    def status(root, cell, study):
        if cell.name == "depth=1" and len(failures) < 2:
            failures.append(cell.name)
            raise [OSError("gone"), UserError("no row")][len(failures) - 1]
        return known(root, cell, study)

    monkeypatch.setattr(cells, "status", status)
    assert set(launch(root, study).values()) == {"finished"}
    assert caplog.text.count("depth=1 can't be read: ") == 1


def test_signals_reach_each_process_once(root, tmp_path):
    """Also one that was started while the first signal arrived; a second signal kills."""
    study = load(tmp_path, {"axes": {"model.depth": (1,)}})
    run = launching.Launch(study, root, 1)
    sent = []

    def active(name):
        calls = {n: (lambda n=n: sent.append((name, n))) for n in ("terminate", "kill")}
        return launching.Active(study.cells[0], types.SimpleNamespace(**calls), root, None, 0)

    run.active = [active("first")]
    with run.signals():
        os.kill(os.getpid(), signal.SIGTERM)
        assert not sent
        run.active.append(active("second"))
        for _ in range(2):
            run.pass_on_signals()
        assert sent == [("first", "terminate"), ("second", "terminate")]
        os.kill(os.getpid(), signal.SIGINT)
        run.pass_on_signals()
    assert sent[2:] == [("first", "kill"), ("second", "kill")]


def test_two_launches_run_each_cell_once(root, tmp_path):
    study = load(tmp_path, {"axes": {"model.depth": (1, 2, 3, 4)}})
    process = subprocess.Popen([sys.executable, "-c", OTHER_LAUNCH, study_flag(study), str(root)])
    assert set(launch(root, study, workers=1).values()) == {"finished"}
    assert process.wait(60) == 0
    assert sorted(started(root)) == ["depth=1", "depth=2", "depth=3", "depth=4"]


OTHER_LAUNCH = f"""
import sys
sys.path[:0] = {[str(ROOT), str(ROOT / "tests" / "studies")]!r}
from vit_jax.studies import launching, pages
run = launching.Launch(pages.load(sys.argv[1]), sys.argv[2], 1)
run.script = {str(FAKE)!r}
run.run(lambda _: None)
assert all(status.state == "finished" for status in run.status.values())
"""


def study_flag(study) -> str:
    return f"{study.path}:{study.arg}"


def test_a_run_that_goes_on_without_its_launch_is_left_alone(root, tmp_path):
    study = load(tmp_path, {"axes": {"model.depth": (1,)}})
    (root / "depth=1").mkdir(parents=True)
    held = lease.acquire(root / "depth=1")
    states = []

    def show(run):
        states.append(run.status["depth=1"].state)
        if states[-1] == "elsewhere":
            held.release()

    assert launch(root, study, show=show) == {"depth=1": "finished"}
    assert "elsewhere" in states
    assert started(root) == ["depth=1"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_launch_that_is_stopped_stops_its_cells(root, tmp_path, number):
    study = load(tmp_path, {"axes": {"model.depth": (15, 1)}})

    def show(run):
        if run.status["depth=15"].state == "running" and (root / "depth=15/config.json").exists():
            os.kill(os.getpid(), number)

    watchdog = threading.Timer(60, os.kill, [os.getpid(), signal.SIGKILL])
    watchdog.start()
    try:
        states = launch(root, study, workers=1, show=show)
    finally:
        watchdog.cancel()
    assert states == {"depth=15": "stopped", "depth=1": "waiting"}
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def run_command(page, root, *flags) -> int:
    return command.main(["run", page, f"--root={root}", *flags])


def test_mistakes_are_found_before_any_cell_runs(root, tmp_path, capsys):
    for axis, message in (
        ({"model.width": (64, 30)}, "width=30: model.width 30 is not divisible by model.num_heads"),
        ({"schedule.cooldown_steps": (0, 9)}, "=9: config.schedule.cooldown_steps is 9; it must"),
    ):
        assert run_command(write_page(tmp_path, {"axes": axis}), root) == 2
        assert message in capsys.readouterr().err
    root.mkdir()
    (root / "config.json").write_text('{"model": {}, "optimizer": {}, "schedule": {}}')
    assert run_command(write_page(tmp_path, {"axes": {"model.depth": (1, 2)}}), root) == 2
    assert f"--root is {root}, a run's folder" in capsys.readouterr().err
    assert [path.name for path in root.iterdir()] == ["config.json"]


def test_a_study_that_has_changed(root, tmp_path, capsys):
    study = load(tmp_path, {"axes": {"model.depth": (1, 2)}})
    launch(root, study)
    page = write_page(tmp_path, {"axes": {"model.depth": (1, 2)}, "set": {"seed": 7}})
    assert run_command(page, root, "--print") == 2
    message = capsys.readouterr().err
    assert "changed under 2 of its cells" in message
    assert "depth=1 (seed: 0 -> 7); depth=2 (seed: 0 -> 7). They are kept" in message
    assert message.count("\n") == 1
    page = write_page(tmp_path, {"axes": {"model.depth": (2, 3)}})
    assert run_command(page, root, "--print") == 0
    assert "depth=3" in capsys.readouterr().out
    assert (root / "depth=1" / "metrics.jsonl").exists()
    assert cells.strays(root, study) == []
    assert cells.strays(root, load(tmp_path, {"axes": {"model.depth": (2, 3)}})) == ["depth=1"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ({"num_epochs": 2}, {"num_epochs": 200}, "num_epochs: 2.0 -> 200.0"),
        ({"total_steps": 60}, {"total_steps": 80}, "total_steps: 60 -> 80"),
        ({"init_from": "a.npz"}, {"init_from": "b.npz"}, "init_from: 'a.npz' -> 'b.npz'"),
        ({"num_epochs": 2, "total_steps": 60}, {"num_epochs": 200, "total_steps": 60}, ""),
        ({"mesh.fsdp": 1}, {"mesh.fsdp": 2}, ""),
    ],
)
def test_what_counts_as_a_change_of_a_cell(root, tmp_path, old, new, message):
    before, after = (load(tmp_path, {"set": fields}) for fields in (old, new))
    (cell,) = before.cells
    recorded = pages.configured(cell.config, cell.fields)
    recorded.total_steps = recorded.total_steps or 60  # as train.py
    (root / cell.name).mkdir(parents=True)
    (root / cell.name / "config.json").write_text(recorded.to_json_best_effort())
    cells.check_unchanged(root, before)
    if not message:
        cells.check_unchanged(root, after)
        return
    with pytest.raises(UserError, match=rf"run \({message}\)"):
        cells.check_unchanged(root, after)


def test_a_status_without_the_length_of_the_run(root, tmp_path):
    study = load(tmp_path, {"axes": {"model.depth": (1, 2)}})
    status = {
        "depth=1": cells.Status("stopped", 1000, None),
        "depth=2": cells.Status("running", 1000, 2000),
    }
    _, first, second, _ = showing.status_lines(study, status)
    assert first.split() == ["depth=1", "stopped", "1,000"]
    assert second.split() == ["depth=2", "running", "1,000/2,000"]


def test_early_stopping(root, tmp_path):
    """A cell then counts with its best evaluation."""
    study = load(tmp_path, {"collect": ("val/accuracy", "val/loss"), "early_stopping": True})
    launch(root, study)
    logged = rows(root / "run")
    logged[2] |= {"val/accuracy": 0.99, "val/loss": 0.1}
    (root / "run" / "metrics.jsonl").write_text("\n".join(map(json.dumps, logged)))
    (cell,) = study.cells
    expected = {"val/accuracy": 0.99, "val/loss": 0.1}
    assert cells.status(root, cell, study).values == expected
    study = dataclasses.replace(study, early_stopping=False)
    assert cells.status(root, cell, study).values["val/loss"] == 1.0


def test_gpus_are_divided_among_workers(root, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,3,5")
    study = load(tmp_path, {"axes": {"model.depth": (1, 2)}})
    run = launching.Launch(study, root, 2)
    found = [run.environment(slot)["CUDA_VISIBLE_DEVICES"] for slot in range(2)]
    assert found == ["0,3", "1,5"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(launching.glob, "glob", lambda _: ["/dev/nvidia2", "/dev/nvidia10"])
    assert launching.visible_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,3,5")
    with pytest.raises(UserError, match="--workers=5 is more than the 4 GPUs here"):
        launching.Launch(study, root, 5)


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_studies_run_when_quick(name, tmp_path):
    flags = ["run", f"configs/scaling/{name}.py:quick", f"--root={tmp_path}", "--workers=2"]
    launch = [sys.executable, "-m", "vit_jax.scaling", *flags]
    result = subprocess.run(launch, cwd=ROOT, env=ONE_DEVICE, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_a_study_that_is_killed_completes(tmp_path):
    """Kills a launch and its cells in the middle: the same command finishes them all."""
    page = write_page(tmp_path, {"axes": {"model.depth": (1, 2)}, "set": {"total_steps": 200}})
    root = tmp_path / "study"
    flags = ["-m", "vit_jax.scaling", "run", page, f"--root={root}"]
    launch = subprocess.Popen([sys.executable, *flags], cwd=ROOT, env=ONE_DEVICE)
    while not (root / "depth=1" / "checkpoints" / "20").exists():
        assert launch.poll() is None
        time.sleep(0.05)
    launch.kill()
    launch.wait()
    children = subprocess.run(
        ["pgrep", "-f", f"train.py.*{root}/depth"], capture_output=True, text=True, check=True
    )
    for process in children.stdout.split():
        os.kill(int(process), signal.SIGKILL)
    result = subprocess.run(
        [sys.executable, *flags], cwd=ROOT, env=ONE_DEVICE, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "2 cells: 2 finished" in result.stdout
    assert "Resuming at step" in (root / "depth=1" / "train.log").read_text()
    assert steps_in(root / "depth=1")[-1] == 200


def test_printed_commands_run_the_cells(root, tmp_path, capsys):
    stages = {
        "sweep": {"axes": {"lr": (0.1, 0.01)}},
        "final": {"best": "sweep", "over": ("lr",), "set": {"seed": 7}},
    }
    page = write_page(tmp_path, {"stages": stages})
    assert run_command(page, root, "--print") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "# sweep"
    assert lines[3] == "# final, once sweep is finished"
    for line in lines[1:3]:
        python, script, *flags = shlex.split(line)
        assert (python, script) == ("python", "train.py")
        subprocess.run([sys.executable, FAKE, *flags], check=True)
    assert lines[4].startswith("found=$(python -m vit_jax.scaling run ")
    lookup = shlex.split(lines[4].removeprefix("found=$(").partition(")")[0])
    assert lookup[-1] == "--command_of=final/run"
    assert command.main(lookup[3:]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert "--config.schedule.base_lr=0.01 " in line
    assert line.endswith("/final/run")


@pytest.mark.slow
def test_a_study_in_a_bucket(bucket, tmp_path):
    """A branch of a run in a bucket; nothing is run twice."""
    stages = {
        "trunk": {"set": {"keep_every_steps": 20, "schedule.name": "rsqrt", "total_steps": 20}},
        "branch": {
            "after": "trunk",
            "set": {"init_from": "{parent}/checkpoints/20", "init_mode": "continue"}
            | {"total_steps": 25, "keep_every_steps": 20, "schedule.name": "rsqrt"},
        },
    }
    study = load(tmp_path, {"stages": stages})
    for _ in range(2):
        run = launching.Launch(study, "gs://bar/study", 1)
        run.run(lambda _: None)
        assert {status.state for status in run.status.values()} == {"finished"}, run.status
    assert "step 20" in bucket.objects["study/branch/run/train.log"].content.decode()
    assert not [name for name in bucket.objects if name.endswith(".lock")]
