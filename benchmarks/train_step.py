"""Measures the training step, beside other implementations of the same model.

    python -m benchmarks.train_step
    python -m benchmarks.train_step --model=Ti/16,S/16,B/16,L/16,H/14 --image_size=224,384
    python -m benchmarks.train_step --peers=ours,timm --batch_size=16 --rounds=9

Beside ours: a textbook ViT in Flax (`textbook_vit.py`), and where they are installed timm, eager
and compiled, and transformers. One device is used. Each implementation has a process of its own
and takes turns with the others, in each round: the forward pass, forward and backward, and the
whole step. On a CPU the processes live until the end, and wait while another is measured. On an
accelerator they end after each turn, so that the next one has all of the memory; what they compiled
is kept.

Prints one table for each model and image size, of medians over the rounds. The ratio is that of the
whole steps within a round, with the smallest and the largest. MFU counts the FLOPs of the model's
matrix products, three times for forward and backward. Memory is the most that was in use on the
device; on a CPU, what JAX's compiler says that the step needs.
"""

import argparse
import concurrent.futures
import multiprocessing
import os
import statistics
import sys
import tempfile
import time

from benchmarks import devices, peers
from benchmarks.peers import PARTS, Settings
from vit_jax import models
from vit_jax.scaling import flops

SPAWN = multiprocessing.get_context("spawn")
# For 224 pixels; for larger images divided by the ratio of their areas, to a power of two.
ACCELERATOR_BATCH = {"Ti": 1024, "S": 512, "B": 256, "L": 128, "H": 64}
CPU_BATCH = 16
MAX_ERROR = 80  # characters of an error in a table
HEADER = (
    "| | forward | forward and backward | whole step | images/s | step / our step | MFU | memory "
    "| compiling |\n" + "| --- " * 9 + "|"
)


class Worker:
    """A process that runs one implementation. Its errors are results: {"error": text}.

    Attributes:
        created: `num_params`, and the seconds of `compiling` or None.
    """

    def __init__(self, name: str, settings: Settings):
        """Starts the process, and waits until it has compiled the step."""
        self.pipe, theirs = SPAWN.Pipe()
        self.process = SPAWN.Process(target=serve, args=(theirs, name, settings), daemon=True)
        self.process.start()
        theirs.close()
        self.created = self.receive()

    def turn(self, steps: int) -> dict:
        """Returns the seconds of each part of the step, and the memory."""
        if "error" in self.created:
            return self.created
        try:
            self.pipe.send(steps)
        except OSError:  # it failed in an earlier turn
            return {"error": "its process ended in an earlier turn"}
        return self.receive()

    def receive(self) -> dict:
        try:
            return self.pipe.recv()
        except EOFError:
            self.process.join()
            return {"error": f"its process ended with exit code {self.process.exitcode}"}

    def close(self) -> None:
        self.pipe.close()  # ends `serve`
        self.process.join()


def serve(pipe, name: str, settings: Settings) -> None:
    """Runs in a worker: creates the implementation, and takes turns until the pipe is closed."""
    try:
        peer = peers.create(name, settings)
        pipe.send(dict(num_params=peer.num_params, compiling=peer.compile_seconds))
        while True:
            pipe.send(take_turn(peer, pipe.recv()))
    except EOFError:
        pass
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        pipe.send({"error": text.replace("|", "/")[:MAX_ERROR]})


def take_turn(peer, steps: int) -> dict:
    """Runs each part of the step, the first time unmeasured.

    Args:
        peer: a JaxPeer or a TorchPeer.
        steps: how often to run each part.

    Returns:
        The seconds of each of PARTS, and "bytes", the memory or None.
    """
    results = {}
    for part in PARTS:
        peer.run(part, 1)
        start = time.perf_counter()
        peer.run(part, steps)
        results[part] = (time.perf_counter() - start) / steps
    return results | {"bytes": peer.peak_bytes()}


def measure(names: list[str], settings: Settings, steps: int, rounds: int, keep: bool) -> dict:
    """Measures implementations in turns.

    Args:
        names: keys of `peers.PEERS`.
        settings: the model and its batches.
        steps: how often each part runs in a turn.
        rounds: the number of turns of each.
        keep: whether the processes live until the end.

    Returns:
        {name: {"created": the worker's, "turns": the results of its turns}}.
    """
    results = {name: {"turns": []} for name in names}
    workers = {}
    for i in range(rounds):
        for name in names:
            print(f"{settings}: {name}, round {i + 1} of {rounds}", file=sys.stderr, flush=True)
            worker = workers.get(name) or Worker(name, settings)
            results[name].setdefault("created", worker.created)
            results[name]["turns"].append(worker.turn(steps))
            if keep:
                workers[name] = worker
            else:
                worker.close()
    for worker in workers.values():
        worker.close()
    return results


def print_table(results: dict, settings: Settings, peak: float) -> None:
    """Prints the results of `measure`; `peak` is the device's operations per second."""
    sizes = {r["created"].get("num_params") for r in results.values()} - {None}
    print(
        f"\n{settings.model}, {settings.image_size} px, batch {settings.batch_size}, "
        f"{settings.dtype}; {' or '.join(f'{size:,}' for size in sizes)} parameters\n\n{HEADER}"
    )
    model = models.create(settings.model, num_classes=peers.NUM_CLASSES)
    shape = (settings.image_size, settings.image_size, 3)
    step_flops = 3 * flops.forward_flops(model, shape) * settings.batch_size
    ours = results.get("ours", next(iter(results.values())))["turns"]
    for name, result in results.items():
        print(table_row(name, result, ours, settings.batch_size, step_flops / peak), flush=True)


def table_row(name: str, result: dict, ours: list[dict], batch_size: int, limit: float) -> str:
    """Returns one row; `limit` is how many seconds a step would take at the device's peak."""
    turns = result["turns"]
    if error := next((turn["error"] for turn in turns if "error" in turn), None):
        return f"| {name} | {error} " + "| " * 7 + "|"
    median = {part: statistics.median(turn[part] for turn in turns) for part in PARTS}
    memory = turns[-1]["bytes"]
    pairs = [(turn, our) for turn, our in zip(turns, ours, strict=True) if "error" not in our]
    ratios = sorted(turn["step"] / our["step"] for turn, our in pairs)
    ratio = "1" if turns is ours else "-"
    if ratios and turns is not ours:
        ratio = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    compiling = result["created"]["compiling"]
    return " | ".join(
        [
            f"| {name}",
            *(f"{1e3 * median[part]:,.1f} ms" for part in PARTS),
            f"{batch_size / median['step']:,.1f}",
            ratio,
            f"{limit / median['step']:.1%}",
            "-" if memory is None else f"{memory / 2**30:.2f} GiB",
            "- |" if compiling is None else f"{compiling:.1f} s |",
        ]
    )


def batch_size_for(model: str, image_size: int, platform: str) -> int:
    """Returns the default batch size."""
    if platform == "cpu":
        return CPU_BATCH
    largest = ACCELERATOR_BATCH.get(model.split("/")[0], 64) * 224**2 / image_size**2
    return max(1, 2 ** int(largest).bit_length() // 2)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="S/16", help="sizes, separated by commas")
    parser.add_argument("--image_size", default="224", help="pixels, separated by commas")
    parser.add_argument("--batch_size", type=int, help="default: by model and device")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        help="default: float32 on a CPU, bfloat16 elsewhere",
    )
    known = ",".join(peers.PEERS)
    parser.add_argument("--peers", help=f"of {known}; default: those that are installed")
    parser.add_argument("--steps", type=int, help="steps in a turn; default: 2 on a CPU, else 20")
    parser.add_argument("--rounds", type=int, help="default: 5 on a CPU, else 3")
    args = parser.parse_args()
    if unknown := set(args.peers.split(",") if args.peers else ()) - set(peers.PEERS):
        parser.error(f"--peers has {', '.join(sorted(unknown))}; it must be of {known}")
    return args


def main() -> None:
    args = parse_arguments()
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=SPAWN) as process:
        device = process.submit(devices.describe, args.dtype).result()
    on_cpu, dtype = device["platform"] == "cpu", device["dtype"]
    names = args.peers.split(",") if args.peers else peers.installed()
    if not args.peers and on_cpu:
        names.remove("ours_xla")  # the same as "ours"
    print(f"{device['machine']}\n\nPeak: {device['peak']}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        if not on_cpu:  # a process that starts again finds what it compiled
            os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(folder, "jax")
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(folder, "inductor")
        for model in args.model.split(","):
            for image_size in map(int, args.image_size.split(",")):
                batch_size = args.batch_size
                batch_size = batch_size or batch_size_for(model, image_size, device["platform"])
                settings = Settings(model, image_size, batch_size, dtype)
                steps = args.steps or (2 if on_cpu else 20)
                rounds = args.rounds or (5 if on_cpu else 3)
                results = measure(names, settings, steps, rounds, keep=on_cpu)
                print_table(results, settings, device["flops"])


if __name__ == "__main__":
    main()
