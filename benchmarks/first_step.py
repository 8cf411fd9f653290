"""The time from the command to a run's first step: cold, and warm, with its programs compiled.

python -m benchmarks.first_step

Trains one step of presets at their full size on a few random images, batches of two, twice in the
same folder; the best of two such rounds.
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
CACHE = "JAX_COMPILATION_CACHE_DIR"  # of runs before: nothing would be cold


def main():
    print("| preset | cold | warm | warm / cold |")
    print("| --- | --- | --- | --- |", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        write_images(folder / "images")
        for preset in sys.argv[1:] or PRESETS:
            rounds = [[first_step(preset, folder, str(i)) for _ in range(2)] for i in range(ROUNDS)]
            cold, warm = map(min, zip(*rounds, strict=True))
            print(f"| `{preset}` | {cold:.1f} s | {warm:.1f} s | {warm / cold:.2f} |", flush=True)


def write_images(folder: pathlib.Path) -> None:
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for i in range(8):
            path = folder / split / f"class{i % 2}" / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (256, 256, 3), np.uint8)).save(path)


def first_step(preset: str, folder: pathlib.Path, run: str) -> float:
    """Seconds until the first step of a run is logged, which is then ended."""
    command = [sys.executable, "train.py", f"--config=configs/{preset}.py"]
    command += [f"--workdir={folder / preset / run}", "--config.log_every_steps=1"]
    command += ["--config.eval_every_steps=0", "--config.checkpoint_every_steps=0"]
    if preset != "digits":
        command += [f"--config.dataset.name={folder / 'images'}", "--config.batch_size=2"]
        command += ["--config.dataset.eval_split=val", "--config.total_steps=20000"]
    own = {name: value for name, value in os.environ.items() if name != CACHE}
    start = time.perf_counter()
    with subprocess.Popen(command, cwd=ROOT, env=own, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("step 1/"):
                seconds = time.perf_counter() - start
                process.kill()
                return seconds
    raise RuntimeError(f"{command} ended without a step")


if __name__ == "__main__":
    main()
