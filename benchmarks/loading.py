"""How fast and in how much memory published weights load, for each format.

python -m benchmarks.loading

Writes a B/16 of random parameters in each, about 350 MB, and loads it in a process of its own.
Reads the peak of memory from /proc: Linux only.
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
    """Format -> path of a B/16."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    from configs import common
    from vit_jax import models
    from vit_jax.pretrained import export
    from vit_jax.runs import run_folder

    model = models.create("B/16")
    shapes = jax.eval_shape(
        lambda: model.init(jax.random.key(0), np.zeros((1, 224, 224, 3), np.float32))
    )["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), shapes)
    paths = {"google": folder / "w.npz", "timm": folder / "timm", "hf": folder / "hf"}
    for format, path in paths.items():
        export.save(params, path, format, model=model)
    config = common.get_config()
    config.update(num_classes=1000, image_size=224, dtype="float32")
    (folder / "run" / "checkpoints" / "1").mkdir(parents=True)
    run_folder.write_config(folder / "run", config)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.resolve() / "run" / "checkpoints" / "1" / "params", params)
    return paths | {"run": folder / "run"}


def load(path: str) -> dict[str, float]:
    """Seconds, and the peak of memory above what the process had before, in bytes."""
    from vit_jax import models, pretrained

    model = models.create("B/16")
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory("VmRSS")
    start = time.perf_counter()
    pretrained.load(path, model, (224, 224))
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "bytes": memory("VmHWM") - before}


def memory(field: str) -> int:
    """Bytes: VmRSS what the process has now, VmHWM the most it had."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def size(path: pathlib.Path) -> int:
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--load", help=argparse.SUPPRESS)  # what the processes are started with
    given = parser.parse_args()
    if given.load:
        print(json.dumps(load(given.load)))
        return
    with tempfile.TemporaryDirectory() as folder:
        paths = write(pathlib.Path(folder))
        print("| B/16 | MB | seconds | peak memory / size |\n| --- | --- | --- | --- |")
        for format in FORMATS:
            command = [sys.executable, "-m", "benchmarks.loading", f"--load={paths[format]}"]
            runs = [json.loads(subprocess.check_output(command)) for _ in range(3)]
            best = min(runs, key=lambda run: run["seconds"])
            num_bytes = size(paths[format])
            peak = max(run["bytes"] for run in runs) / num_bytes
            print(f"| {format} | {num_bytes / 1e6:.0f} | {best['seconds']:.2f} | {peak:.2f} |")


if __name__ == "__main__":
    main()
