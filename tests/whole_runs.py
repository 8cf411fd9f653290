"""Runs as users start them, and what they leave."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp

from configs import digits

ROOT = pathlib.Path(__file__).parents[1]
ONE_DEVICE = {**os.environ, "XLA_FLAGS": ""}


def command(*args, script="train.py"):
    return [sys.executable, str(ROOT / script), *args]


def run_script(script, *args):
    return subprocess.run(
        command(*args, script=script),
        cwd=ROOT,
        env=ONE_DEVICE,
        timeout=300,
        capture_output=True,
        text=True,
    )


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def untimed(row):
    return {name: value for name, value in row.items() if name != "train/images_per_second"}


def quick_config(**fields):
    config = digits.get_config("quick")
    config.mesh.data = 8
    config.update(fields)
    return config


def assert_same_run(workdir, other):
    assert steps_in(workdir) == steps_in(other)
    for item in sorted(path.name for path in last_checkpoint(other).iterdir() if path.is_dir()):
        if item == "metrics":
            continue
        ours, theirs = (restore(folder, item) for folder in (workdir, other))
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert [untimed(row) for row in rows(workdir)] == [untimed(row) for row in rows(other)]


def steps_in(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def last_checkpoint(workdir):
    return workdir / "checkpoints" / str(steps_in(workdir)[-1])


def restore(workdir, item):
    """An item of the last checkpoint, as it is stored."""
    return ocp.StandardCheckpointer().restore(last_checkpoint(workdir) / item)
