"""Kills a run at random moments, and compares it with a run that wasn't killed, bit for bit.

    python tests/soak.py --kills=20
    python tests/soak.py --kills=5 --processes=2    # kills one of the two, at random
    python tests/soak.py --kills=20 --bucket        # in a bucket, of a server on this machine

After each kill the newest complete checkpoint is compared with the same step of the undisturbed
run: parameters, their average and the optimizer's state. The last start runs to the end; then all
checkpoints and all rows of metrics.jsonl are compared.
"""

import argparse
import contextlib
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from bucket_server import BucketServer
from whole_runs import ROOT, assert_same_checkpoint, steps_in, untimed_rows

from vit_jax.storage.files import open_path

SAVE_EVERY = 20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="how often to kill the run")
    parser.add_argument("--processes", type=int, default=1, help="the run's number of processes")
    parser.add_argument("--num_steps", type=int, default=2000, help="the run's number of steps")
    parser.add_argument(
        "--max_seconds", type=float, default=6.0, help="longest training between two kills"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments to kill at")
    parser.add_argument("--bucket", action="store_true", help="keep the runs in a bucket")
    args = vars(parser.parse_args())
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = pathlib.Path(name)
        if args.pop("bucket"):
            server = stack.enter_context(BucketServer())
            os.environ.update(server.environment)
            args["bucket"] = open_path("gs://bar")
        identical = soak(folder, **args)
    if identical:
        print(f"{identical} of {args['kills']} kills, and the end: identical bits")
    else:
        print("The finished runs differ")
    return 0 if identical == args["kills"] else 1


def run_flags(num_steps: int) -> list[str]:
    """Flags of a run that spends as much time on saving and evaluating as on training."""
    return [
        "--config=configs/digits.py",
        "--config.model.width=64",
        f"--config.total_steps={num_steps}",
        "--config.schedule.warmup_steps=20",
        "--config.ema_decay=0.99",
        "--config.log_every_steps=5",
        f"--config.eval_every_steps={2 * SAVE_EVERY}",
        f"--config.checkpoint_every_steps={SAVE_EVERY}",
        f"--config.keep_every_steps={SAVE_EVERY}",
        "--heartbeat_seconds=10",
    ]


def soak(folder, kills, processes=1, num_steps=2000, max_seconds=6.0, seed=0, bucket=None) -> int:
    """Returns how many kills left identical bits; 0 if the finished runs differ.

    The undisturbed run is in `folder`; the killed one in `bucket`, if it is given.
    """
    undisturbed, flags = folder / "undisturbed", run_flags(num_steps)
    killed = (bucket or folder) / "killed"
    finish(start(undisturbed, processes, flags))
    rng, identical = random.Random(seed), 0
    for i in range(kills):
        process = start(killed, processes, flags)
        # One kill in five comes while the run starts; the others while it trains.
        starting = rng.random() < 0.2
        if starting:
            time.sleep(rng.uniform(0.0, 6.0))
        else:
            wait_for_first_step(killed, process)
            time.sleep(rng.uniform(0.0, max_seconds))
        if process.poll() is not None:
            raise RuntimeError(f"The run ended before kill {i + 1}: increase --num_steps")
        victim = kill(process, processes, rng)
        newest = max(steps_in(killed), default=None)
        same = newest is None or is_same_checkpoint(killed, undisturbed, newest)
        identical += same
        print(
            f"kill {i + 1}: {victim} while {'starting' if starting else 'training'}, newest "
            f"checkpoint {newest}: {'identical' if same else 'DIFFERENT'}",
            flush=True,
        )
    finish(start(killed, processes, flags))
    steps = steps_in(undisturbed)
    same = steps_in(killed) == steps and untimed_rows(killed) == untimed_rows(undisturbed)
    same = same and all(is_same_checkpoint(killed, undisturbed, step) for step in steps)
    return identical if same else 0


def start(workdir: pathlib.Path, processes: int, flags) -> subprocess.Popen:
    """Starts the run, or resumes it; its console goes to a file."""
    command = [sys.executable]
    if processes > 1:
        command += ["launch/local.py", f"--num_processes={processes}"]
    command += ["train.py", f"--workdir={workdir}", *flags]
    console(workdir).parent.mkdir(exist_ok=True)
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"},
        stdout=console(workdir).open("w"),
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def console(workdir) -> pathlib.Path:
    """Returns the local file that the output of a run goes to."""
    if "://" in str(workdir):
        return pathlib.Path(tempfile.gettempdir()) / f"vit_jax_soak_{os.getpid()}" / workdir.name
    return workdir / "console"


def wait_for_first_step(workdir: pathlib.Path, process) -> None:
    """Waits until the run logs a step, or ends."""
    while "\nstep " not in console(workdir).read_text() and process.poll() is None:
        time.sleep(0.01)


def kill(process, processes: int, rng) -> str:
    """Kills the run, or one of its processes, with SIGKILL; returns which, once all have ended."""
    if processes == 1:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return "the run"
    children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children")
    pids = []
    while len(pids) < processes and process.poll() is None:  # until the launcher has started them
        pids = [int(pid) for pid in children.read_text().split()]
    index = rng.randrange(processes)
    if len(pids) == processes:
        os.kill(pids[index], signal.SIGKILL)
    process.wait(timeout=180)
    return f"process {index}"


def finish(process) -> None:
    """Waits for the end of a run; raises RuntimeError if it failed."""
    if process.wait(timeout=900) != 0:
        raise RuntimeError(f"{process.args} ended with {process.returncode}")


def is_same_checkpoint(workdir, other, step: int) -> bool:
    try:
        assert_same_checkpoint(workdir, other, step)
    except (AssertionError, ValueError):  # other bits, or another tree
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
