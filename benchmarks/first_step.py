"""Measures the time from the command to a run's first step: cold, and with compiled programs.

    python -m benchmarks.first_step [PRESET...]

Starts each preset twice in the same folder, in two rounds, and prints the shortest times. The
models have their full size and train on batches of two random images.
"""

import os
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parents[1]
PRESETS = ("digits", "vit_s16", "vit_b16", "vit_l16")
ROUNDS = 2
CACHE_VARIABLE = "JAX_COMPILATION_CACHE_DIR"  # with programs of other runs no start is cold


def main():
    print("| preset | cold | warm | warm / cold |")
    print("| --- | --- | --- | --- |", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        write_images(folder / "images")
        for preset in sys.argv[1:] or PRESETS:
            rounds = []
            for i in range(ROUNDS):
                workdir = folder / preset / str(i)
                rounds.append([time_first_step(preset, folder, workdir) for _ in range(2)])
            cold, warm = map(min, zip(*rounds, strict=True))
            print(f"| `{preset}` | {cold:.1f} s | {warm:.1f} s | {warm / cold:.2f} |", flush=True)


def write_images(folder: pathlib.Path) -> None:
    """Writes random images as <split>/<class>/<number>.jpg."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for i in range(8):
            path = folder / split / f"class{i % 2}" / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (256, 256, 3), np.uint8)).save(path)


def time_first_step(preset: str, folder: pathlib.Path, workdir: pathlib.Path) -> float:
    """Starts a run, kills it when its first step is logged, and returns the seconds until then."""
    command = [sys.executable, "train.py", f"--config=configs/{preset}.py"]
    command += [f"--workdir={workdir}", "--config.log_every_steps=1"]
    command += ["--config.eval_every_steps=0", "--config.checkpoint_every_steps=0"]
    if preset != "digits":
        command += [f"--config.dataset.name={folder / 'images'}", "--config.batch_size=2"]
        command += ["--config.dataset.eval_split=val", "--config.total_steps=20000"]
    env = {name: value for name, value in os.environ.items() if name != CACHE_VARIABLE}
    start = time.perf_counter()
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("step 1/"):
                seconds = time.perf_counter() - start
                process.kill()
                return seconds
    raise RuntimeError(f"The run ended before its first step: {' '.join(command)}")


if __name__ == "__main__":
    main()
