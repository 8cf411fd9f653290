"""Starting runs as users do, and comparing what runs write."""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from forked import HANG_SECONDS

ROOT = pathlib.Path(__file__).resolve().parents[1]
ONE_DEVICE = {**os.environ, "XLA_FLAGS": ""}
QUICK = ("--config=configs/digits.py:quick", "--config.model.depth=1")


def command(*args, script="train.py"):
    return [sys.executable, str(ROOT / script), *args]


def run_script(script, *args):
    return subprocess.run(
        command(*args, script=script),
        cwd=ROOT,
        env=ONE_DEVICE,
        timeout=HANG_SECONDS,
        capture_output=True,
        text=True,
    )


def wait_for(path: pathlib.Path, text: str, script) -> None:
    """Waits until a file contains a text; fails if the script that writes it ends before."""
    while not path.exists() or text not in path.read_text():
        assert script.poll() is None, script.finish()
        time.sleep(0.01)


def quick_config(**fields):
    """The configuration that QUICK gives, on eight devices."""
    from configs import digits  # soak.py doesn't have the repository on its path

    config = digits.get_config("quick")
    config.mesh.data = 8
    config.model.depth = 1
    config.update(fields)
    return config


def edit_config(workdir, edit) -> None:
    """Changes what a run's config.json holds."""
    fields = json.loads((workdir / "config.json").read_text())
    edit(fields)
    (workdir / "config.json").write_text(json.dumps(fields))


@contextlib.contextmanager
def one_device_only(mesh):
    """Lets runs in this process have one device, whatever their configuration says."""
    import evaluate
    import train

    with pytest.MonkeyPatch.context() as patch:
        for module in (train, evaluate):
            patch.setattr(module, "create_mesh", lambda **_: mesh)
        yield


def stop_at(moment):
    """Returns a `Preemption.sync` that stops at a sync point: at a step or an evaluation batch."""

    def sync(preemption):
        preemption.sync_points += 1
        preemption.stopping = preemption.sync_points >= moment
        return preemption.stopping

    return sync


def rows(workdir) -> list[dict]:
    """The rows of metrics.jsonl."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


TIMED = {
    f"train/{name}"
    for name in ("images_per_second", "steps_per_second", "input_wait", "device_wait")
}


def untimed(row: dict) -> dict:
    """A row without its throughput."""
    return {name: value for name, value in row.items() if name not in TIMED}


def untimed_rows(workdir) -> list[dict]:
    return [untimed(row) for row in rows(workdir)]


def steps_in(workdir) -> list[int]:
    """The steps of a run's complete checkpoints."""
    paths = list((workdir / "checkpoints").glob("*"))
    if "://" in str(workdir):  # where a checkpoint isn't renamed once it is complete
        paths = [path for path in paths if (path / "commit_success.txt").exists()]
    return sorted(int(path.name) for path in paths if path.name.isdigit())


def last_checkpoint(workdir) -> pathlib.Path:
    return workdir / "checkpoints" / str(steps_in(workdir)[-1])


def restore_item(path):
    """An item of a checkpoint that any number of processes saved, on one device."""
    checkpointer = ocp.StandardCheckpointer()
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        checkpointer.metadata(path).item_metadata.tree,
    )
    return checkpointer.restore(path, shapes)


def assert_same_checkpoint(workdir, other, step: int) -> None:
    """Asserts that every item of a checkpoint has the same bits in two runs."""
    ours, theirs = (folder / "checkpoints" / str(step) for folder in (workdir, other))
    for item in sorted(path.name for path in theirs.iterdir() if path.is_dir()):
        if item != "metrics":
            trees = (restore_item(folder / item) for folder in (ours, theirs))
            jax.tree.map(np.testing.assert_array_equal, *trees)


def assert_same_run(workdir, other) -> None:
    """Asserts that two runs have the same checkpoints, the last bit for bit, and rows."""
    ours, theirs = (
        sorted(path.name for path in (folder / "checkpoints").iterdir())
        for folder in (workdir, other)
    )
    assert ours == theirs
    assert_same_checkpoint(workdir, other, steps_in(other)[-1])
    assert untimed_rows(workdir) == untimed_rows(other)
