"""Kills a run again and again at random moments: what is left must have the bits of one let alone.

    python tests/soak.py --kills=20
    python tests/soak.py --kills=5 --processes=2    # one of the two, drawn each time

After each kill the newest complete checkpoint is compared with the same step of the run that was
let alone: parameters, their average, the optimizer's state. At the end, once a start was let
through, all of the two runs is: their checkpoints and every row of metrics.jsonl.
"""

import argparse
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
import orbax.checkpoint as ocp

ROOT = pathlib.Path(__file__).resolve().parents[1]
EVERY = 20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--num_steps", type=int, default=2000, help="of the run")
    parser.add_argument("--longest", type=float, default=6.0, help="seconds of training let be")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        same = soak(pathlib.Path(folder), **vars(given))
    print(f"{same} of {given.kills} kills, and the end: identical bits" if same else "Not the same")
    return 0 if same == given.kills else 1


def run_of(num_steps: int) -> list[str]:
    """As busy with saving and evaluating as with training."""
    return [
        "--config=configs/digits.py",
        "--config.model.width=64",
        f"--config.total_steps={num_steps}",
        "--config.schedule.warmup_steps=20",
        "--config.ema_decay=0.99",
        "--config.log_every_steps=5",
        f"--config.eval_every_steps={2 * EVERY}",
        f"--config.checkpoint_every_steps={EVERY}",
        f"--config.keep_every_steps={EVERY}",
        "--heartbeat_seconds=10",
    ]


def soak(folder, kills, processes=1, num_steps=2000, longest=6.0, seed=0) -> int:
    """How many kills left a run with the bits of one let alone; 0 if its end isn't the same."""
    killed, alone, arguments = folder / "killed", folder / "alone", run_of(num_steps)
    finish(start(alone, processes, arguments))
    moments, same = random.Random(seed), 0
    for i in range(kills):
        process = start(killed, processes, arguments)
        # A moment of the start now and then; else of training, evaluating or saving.
        beginning = moments.random() < 0.2
        if beginning:
            time.sleep(moments.uniform(0.0, 6.0))
        else:
            wait_for_start(killed, process)
            time.sleep(moments.uniform(0.0, longest))
        if process.poll() is not None:
            raise RuntimeError(f"The run ended before kill {i + 1}: give it more --num_steps")
        victim = kill(process, processes, moments)
        newest = max(steps(killed), default=None)
        equal = newest is None or same_checkpoint(killed, alone, newest)
        same += equal
        print(
            f"kill {i + 1}: {victim} {'at the start' if beginning else 'at work'}, newest "
            f"checkpoint {newest}: {'identical' if equal else 'NOT the same'}",
            flush=True,
        )
    finish(start(killed, processes, arguments))
    ends = steps(killed) == steps(alone) and rows(killed) == rows(alone)
    ends = ends and all(same_checkpoint(killed, alone, step) for step in steps(alone))
    return same if ends else 0


def start(workdir: pathlib.Path, processes: int, arguments) -> subprocess.Popen:
    command = [sys.executable]
    if processes > 1:
        command += ["launch/local.py", f"--num_processes={processes}"]
    command += ["train.py", f"--workdir={workdir}", *arguments]
    workdir.mkdir(exist_ok=True)
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"},
        stdout=(workdir / "started").open("w"),
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def wait_for_start(workdir: pathlib.Path, process) -> None:
    """Until the first line on a step, or the run's end."""
    while "\nstep " not in (workdir / "started").read_text() and process.poll() is None:
        time.sleep(0.01)


def kill(process, processes: int, moments) -> str:
    """kill -9 of the run, or of one of its processes; returns which, once all of it is gone."""
    if processes == 1:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return "the run"
    children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children")
    pids = [int(pid) for pid in children.read_text().split()] if process.poll() is None else []
    which = moments.randrange(processes)
    if len(pids) == processes:
        os.kill(pids[which], signal.SIGKILL)
    process.wait(timeout=180)
    return f"process {which}"


def finish(process) -> None:
    if process.wait(timeout=900) != 0:
        raise RuntimeError(f"{process.args} ended with {process.returncode}")


def steps(workdir) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").glob("[0-9]*[0-9]"))


def same_checkpoint(workdir, other, step: int) -> bool:
    """Whether all that is stored of a step has the same bits."""
    equal = []
    for item in ("params", "ema_params", "opt_state"):
        ours, theirs = (
            arrays(folder / "checkpoints" / str(step) / item) for folder in (workdir, other)
        )
        equal += [jax.tree.structure(ours) == jax.tree.structure(theirs)]
        equal += jax.tree.leaves(jax.tree.map(np.array_equal, ours, theirs))
    return all(equal)


def arrays(path):
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path)


def rows(workdir) -> list[dict]:
    """Of metrics.jsonl, without what the clock decides."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [
        {name: value for name, value in json.loads(line).items() if "per_second" not in name}
        for line in lines
    ]


if __name__ == "__main__":
    sys.exit(main())
