"""Measures the time and memory that loading weights takes, for each format.

    python -m benchmarks.loading

Writes a B/16 with random parameters (350 MB) in each format, and loads it in a new process. Reads
the peak memory from /proc, so it needs Linux.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import time

FORMATS = ("google", "timm", "hf", "run")


def write(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Writes a B/16 in each format; returns {format: path}."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    from configs import common
    from vit_jax import models, pretrained
    from vit_jax.runs import run_folder

    model = models.create("B/16")
    shapes = jax.eval_shape(
        lambda: model.init(jax.random.key(0), np.zeros((1, 224, 224, 3), np.float32))
    )["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), shapes)
    paths = {"google": folder / "w.npz", "timm": folder / "timm", "hf": folder / "hf"}
    for format, path in paths.items():
        pretrained.save(params, path, format, model=model)
    config = common.get_config()
    config.update(num_classes=1000, image_size=224, dtype="float32")
    (folder / "run" / "checkpoints" / "1").mkdir(parents=True)
    run_folder.write_config(folder / "run", config)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.resolve() / "run" / "checkpoints" / "1" / "params", params)
    return paths | {"run": folder / "run"}


def load(path: str) -> dict[str, float]:
    """Returns the seconds that loading takes, and the bytes by which it raises the peak memory."""
    from vit_jax import models, pretrained

    model = models.create("B/16")
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = memory_bytes("VmRSS")
    start = time.perf_counter()
    pretrained.load(path, model, (224, 224))
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "bytes": memory_bytes("VmHWM") - before}


def memory_bytes(field: str) -> int:
    """Returns this process's memory: "VmRSS", now; "VmHWM", at its peak."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def num_bytes(path: pathlib.Path) -> int:
    """Returns the size of a file, or of all files below a folder."""
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--load", help=argparse.SUPPRESS)  # for the new processes
    args = parser.parse_args()
    if args.load:
        print(json.dumps(load(args.load)))
        return
    with tempfile.TemporaryDirectory() as folder:
        paths = write(pathlib.Path(folder))
        print("| B/16 | MB | seconds | peak memory / size |\n| --- | --- | --- | --- |")
        for format in FORMATS:
            command = [sys.executable, "-m", "benchmarks.loading", f"--load={paths[format]}"]
            runs = [json.loads(subprocess.check_output(command)) for _ in range(3)]
            best = min(runs, key=lambda run: run["seconds"])
            size = num_bytes(paths[format])
            peak = max(run["bytes"] for run in runs) / size
            print(f"| {format} | {size / 1e6:.0f} | {best['seconds']:.2f} | {peak:.2f} |")


if __name__ == "__main__":
    main()
