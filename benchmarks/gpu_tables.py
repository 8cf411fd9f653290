"""Makes every table that needs a GPU in one go, and writes them as Markdown.

    pip install -r requirements.txt "jax[cuda13]" torch torchvision timm transformers pillow
    python -m benchmarks.gpu_tables                 # some hours
    python -m benchmarks.gpu_tables --quick         # tiny settings: whether it runs, also on a CPU

Tables of the training step beside other implementations (Ti/16 to H/14 at 224 and 384 pixels),
of training with data, of the input pipeline, and of the time to the first step. The file names the
device, the driver, the versions and the date. A benchmark that fails is named there, and the others
go on.
"""

import argparse
import concurrent.futures
import pathlib
import subprocess
import sys
import time

from benchmarks import devices
from benchmarks.train_step import SPAWN

ROOT = pathlib.Path(__file__).resolve().parents[1]
SIZES = "Ti/16,S/16,B/16,L/16,H/14"
# Title, arguments.
BENCHMARKS = (
    ("Training step", ["train_step", f"--model={SIZES}", "--image_size=224,384"]),
    ("Training step in float32", ["train_step", "--model=S/16,B/16", "--dtype=float32"]),
    ("Training with data", ["end_to_end"]),
    ("Input pipeline", ["input_pipeline"]),
    ("Time to the first step", ["first_step"]),
)
ONCE = ["--steps=1", "--rounds=1"]
QUICK = (
    ("Training step", ["train_step", "--model=Ti/16", "--image_size=32", "--batch_size=2", *ONCE]),
    (
        "Training with data",
        ["end_to_end", "--config=configs/vit_ti16.py", "--batch_size=2", "--images=8", *ONCE]
        + ["--config.image_size=32", "--config.model.depth=1"],
    ),
    ("Time to the first step", ["first_step", "digits"]),
)


def run(title: str, arguments: list[str]) -> tuple[str, bool]:
    """Runs a benchmark; returns its section of the file, and whether it succeeded."""
    name, *flags = arguments
    command = ["python", "-m", f"benchmarks.{name}", *flags]
    print(f"{time.strftime('%H:%M')} {' '.join(command)}", file=sys.stderr, flush=True)
    result = subprocess.run(
        [sys.executable, *command[1:]], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    section = f"## {title}\n\n```\n{' '.join(command)}\n```\n\n{result.stdout.strip()}\n"
    if result.returncode:
        section += f"\nFailed with exit code {result.returncode}.\n"
    return section, result.returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="only checks that it runs")
    parser.add_argument("--out", type=pathlib.Path, default="gpu_tables.md")
    args = parser.parse_args()
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=SPAWN) as process:
        device = process.submit(devices.describe, None).result()
    if device["platform"] != "gpu" and not args.quick:
        parser.error(f"there is no GPU: JAX finds {device['machine']}; --quick runs anywhere")
    succeeded = []
    text = f"# Measured by benchmarks/gpu_tables.py\n\n{device['machine']}\n"
    for title, arguments in QUICK if args.quick else BENCHMARKS:
        section, success = run(title, arguments)
        text += f"\n{section}"
        succeeded.append(success)
        args.out.write_text(text)  # after each: the rest may take hours
    print(f"In {args.out}: {sum(succeeded)} of {len(succeeded)} benchmarks", file=sys.stderr)
    sys.exit(0 if all(succeeded) else 1)


if __name__ == "__main__":
    main()
