"""Measures train.py reading JPEGs, against its bare training step on a batch that never changes.

    python -m benchmarks.end_to_end
    python -m benchmarks.end_to_end --config=configs/vit_ti16.py --batch_size=1024 --steps=200

Makes a folder of JPEGs of 500x375 pixels and 60 to 110 kB. In each round train.py trains on it,
with crops and flips and then with RandAugment besides, and the same step runs alone; each in a
process of its own, on all devices. Prints the medians over the rounds of images/s, and of the share
that is lost within a round. Other flags go to train.py: --config.dtype=float32.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np

from benchmarks import devices, train_step
from benchmarks.input_pipeline import make_jpegs
from vit_jax.parallel import mesh as meshes
from vit_jax.runs import run_folder
from vit_jax.training.program import Program

ROOT = pathlib.Path(__file__).resolve().parents[1]
LINKS = 16  # names of each JPEG, so that the dataset is larger than a batch
BARE = "the step alone"
VARIANTS = {
    "train.py: crop, flip": [],
    "train.py: crop, flip, RandAugment(2, 10)": ["--config.augment.randaugment_layers=2"],
}


def write_images(folder: pathlib.Path, count: int) -> None:
    """Writes `count` JPEGs, each under several names, to train/ and a few to val/."""
    for i, jpeg in enumerate(make_jpegs(count)):
        for split, links in (("train", LINKS), ("val", 1 if i < 4 else 0)):
            first = folder / split / f"class{i % 2}" / f"{i}_0.jpg"
            for link in range(links):
                path = first.with_name(f"{i}_{link}.jpg")
                if link:
                    path.hardlink_to(first)
                else:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(jpeg)


def train(images: pathlib.Path, workdir: pathlib.Path, steps: int, flags: list[str]) -> float:
    """Trains with data; returns the images/s, without those of the first fifth of the steps."""
    every = max(1, steps // 4)
    total_steps = every * (steps // every + 1)
    command = [sys.executable, "train.py", *flags, f"--workdir={workdir}"]
    command += [f"--config.dataset.name={images}", "--config.dataset.eval_split=val"]
    command += [f"--config.total_steps={total_steps}", f"--config.log_every_steps={every}"]
    command += ["--config.schedule.warmup_steps=0", "--config.eval_every_steps=0"]
    command += ["--config.checkpoint_every_steps=0"]
    if code := subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL).returncode:
        sys.exit(f"train.py ended with exit code {code}; its message is above")
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    rates = [row[key] for row in rows if (key := "train/images_per_second") in row]
    return statistics.harmonic_mean(rates[1:])  # the first includes the start


def run_bare_step(workdir: str, steps: int) -> float:
    """Runs a run's own training step on one random batch; returns the images/s."""
    config = run_folder.read_config(workdir)
    program = Program(
        config, (config.image_size, config.image_size, 3), meshes.create_mesh(**config.mesh)
    )
    rng = np.random.default_rng(0)
    shapes = program.batch_shapes
    batch = {
        "images": rng.integers(0, 256, shapes["images"].shape, np.uint8),
        "labels": rng.integers(0, config.num_classes, shapes["labels"].shape, np.int32),
    }
    batch = jax.device_put(batch, jax.tree.map(lambda leaf: leaf.sharding, shapes))
    state, _ = program.train_step(program.init(), batch)
    jax.block_until_ready(state)
    start = time.perf_counter()
    for _ in range(steps):
        state, values = program.train_step(state, batch)
    jax.block_until_ready((state, values))
    return steps * config.batch_size / (time.perf_counter() - start)


def measure(folder: pathlib.Path, args: argparse.Namespace, flags: list[str]) -> dict:
    """Returns {row: images/s of each round}."""
    rates = {name: [] for name in (BARE, *VARIANTS)}
    write_images(folder / "images", args.images)
    for i in range(args.rounds):
        for number, (name, more) in enumerate(VARIANTS.items()):
            print(f"round {i + 1} of {args.rounds}: {name}", file=sys.stderr, flush=True)
            workdir = folder / f"run{i}_{number}"
            rates[name].append(train(folder / "images", workdir, args.steps, [*flags, *more]))
        command = [sys.executable, "-m", "benchmarks.end_to_end", f"--steps={args.steps}"]
        output = subprocess.check_output([*command, f"--bare={folder / f'run{i}_0'}"], cwd=ROOT)
        rates[BARE].append(json.loads(output))
    return rates


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    """Returns the arguments, and those that go to train.py."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/vit_s16.py", help="train.py's")
    parser.add_argument("--batch_size", type=int, help="default: by device, as in train_step.py")
    parser.add_argument("--steps", type=int, default=0, help="default: 8 on a CPU, else 100")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=512, help="JPEGs to generate")
    parser.add_argument("--bare", help=argparse.SUPPRESS)  # for the new processes
    return parser.parse_known_args()


def main() -> None:
    args, flags = parse_arguments()
    if args.bare:
        print(json.dumps(run_bare_step(args.bare, args.steps)))
        return
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=train_step.SPAWN) as process:
        device = process.submit(devices.describe, None).result()
    on_cpu = device["platform"] == "cpu"
    args.steps = args.steps or (8 if on_cpu else 100)
    batch_size = args.batch_size or device["num_devices"] * train_step.batch_size_for(
        "S/16", 224, device["platform"]
    )
    settings = [f"--config.batch_size={batch_size}", f"--config.dtype={device['dtype']}"]
    flags = [f"--config={args.config}", *settings, *flags]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(folder, "compiled")
        rates = measure(pathlib.Path(folder), args, flags)
    print(f"{device['machine']}\n\n`{' '.join(flags)}`\n")
    print("| | images/s | lost |\n| --- | --- | --- |")
    for name, values in rates.items():
        lost = statistics.median(1 - x / y for x, y in zip(values, rates[BARE], strict=True))
        shown = "" if name == BARE else f"{lost:.1%}"
        print(f"| {name} | {statistics.median(values):,.1f} | {shown} |")


if __name__ == "__main__":
    main()
