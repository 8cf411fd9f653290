"""Computes how fast a training step could be at best: the table of floors in NOTES.md.

    python -m benchmarks.floors [--batch_size=64] [--image_size=224]

Two limits for each size and chip, in milliseconds a step; nothing is measured. FLOPs: those of the
model's matrix products, three times for forward and backward, at the chip's bfloat16 peak. Bytes:
what a step without rematerialization moves at least, at the memory's bandwidth, if every operation
between two matrix products is fused into them:

- for each parameter 28 bytes: itself, Adam's two moments (one in bfloat16), read and written; its
  gradient, written and read, since clipping needs all of them before the first update;
- for each token and block what the backward pass needs: the block's input, queries, keys, values,
  the attention's output, the input of the MLP's branch and its hidden layer, all in bfloat16,
  written once and read once.

More memory on the chip, where activations stay, can do with fewer bytes.
"""

import argparse

import jax
import numpy as np

from vit_jax import models
from vit_jax.aot.gpu import CARDS
from vit_jax.aot.topology import CHIPS
from vit_jax.scaling import flops

SIZES = ("Ti/16", "S/32", "S/16", "B/32", "B/16", "L/32", "L/16", "H/14")
# Name -> bfloat16 operations and bytes per second.
DEVICES = {name: (CHIPS[name].flops, CHIPS[name].memory_bandwidth) for name in ("v5e", "v6e")}
DEVICES["H100"] = (CARDS["h100"].flops["bf16"], CARDS["h100"].memory_bandwidth)
PARAMETER_BYTES = 2 * (4 + 2 + 4 + 4)
ACTIVATION_BYTES = 2 * 2


def step_flops(model, image_size: int, batch_size: int) -> int:
    """Returns the operations of a step's matrix products."""
    return 3 * batch_size * flops.forward_flops(model, (image_size, image_size, 3))


def step_bytes(model, image_size: int, batch_size: int) -> int:
    """Returns the bytes that a step moves at least, see above."""
    images = np.zeros((1, image_size, image_size, 3), np.float32)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images))
    rows, columns = model.grid((image_size, image_size))
    tokens = rows * columns + (model.pool == "cls")
    numbers = 6 * model.width + (model.mlp_dim or 4 * model.width)
    activations = batch_size * tokens * numbers * model.depth
    return PARAMETER_BYTES * flops.num_params(shapes) + ACTIVATION_BYTES * activations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch_size", type=int, default=64, help="of one chip")
    parser.add_argument("--image_size", type=int, default=224)
    args = parser.parse_args()
    print("| | TFLOPs | GB |", *(f"{name}: FLOPs, bytes |" for name in DEVICES))
    print("| --- " * (3 + len(DEVICES)) + "|")
    for size in SIZES:
        model = models.create(size, num_classes=1000)
        operations = step_flops(model, args.image_size, args.batch_size)
        num_bytes = step_bytes(model, args.image_size, args.batch_size)
        print(f"| {size} | {operations / 1e12:.2f} | {num_bytes / 1e9:.2f} |", end="")
        for peak, bandwidth in DEVICES.values():
            times = 1e3 * operations / peak, 1e3 * num_bytes / bandwidth
            print(f" {times[0]:.1f} ms, {times[1]:.1f} ms |", end="")
        print(flush=True)


if __name__ == "__main__":
    main()
