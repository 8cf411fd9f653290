"""Runs scripts in processes forked from one that has imported them: imports take ten seconds."""

import atexit
import contextlib
import multiprocessing
import os
import pathlib
import runpy
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[1]
HANG_SECONDS = 1800  # a script that takes longer hangs; on a slow machine some take minutes

# What the scripts import when they need it.
LAZY = ("tensorflow", "tensorflow_datasets", "orbax.checkpoint", "sklearn.datasets")


class Script:
    """A running script, with the interface of subprocess.Popen as far as tests need it."""

    def __init__(self, script: str, *args: str, devices: int = 1):
        self.args = [script, *map(str, args)]
        self.folder = tempfile.TemporaryDirectory()
        self.paths = [pathlib.Path(self.folder.name) / name for name in ("stdout", "stderr")]
        self.process = fork_server().Process(
            target=execute, args=(self.args, [str(path) for path in self.paths], devices)
        )
        self.process.start()
        self.pid = self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, number) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.process.exitcode

    def finish(self, timeout: float = HANG_SECONDS) -> subprocess.CompletedProcess:
        """Waits for the script's end; returns its exit code and what it printed."""
        code = self.wait(timeout)
        stdout, stderr = (path.read_text() for path in self.paths)
        self.folder.cleanup()
        return subprocess.CompletedProcess(self.args, code, stdout, stderr)


def run_script(script: str, *args: str, devices: int = 1) -> subprocess.CompletedProcess:
    """Runs a script of the repository, such as "train.py", on so many virtual CPU devices."""
    return Script(script, *args, devices=devices).finish()


def fork_server():
    """The standard library's server of forks, having imported what the scripts import."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["train", "vit_jax.inference.classifier", "vit_jax.figures.attention", *LAZY]
    )
    return context


def execute(args: list[str], paths: list[str], devices: int) -> None:
    """Runs in the forked process: the script as `python SCRIPT ARGS` would."""
    for stream, path in zip((sys.stdout, sys.stderr), paths, strict=True):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, stream.fileno())
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    os.chdir(ROOT)
    sys.argv = args
    try:
        with contextlib.suppress(BrokenPipeError):
            runpy.run_path(str(ROOT / args[0]), run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # JAX leaves the other processes; forks end without it
