"""The time of the attention kernel on a TPU, by the schedule that the TPU's compiler made for it.

The compiler estimates no time for a kernel, but it can write down the schedule: bundles of
instructions that start together, in a cycle at least. They are counted by compiling the kernel once
more, in a process of its own: the compiler's settings are read when it starts, and with this one it
writes down everything that it compiles.

    python -m vit_jax.aot.kernel_cost v5e:2x2 bfloat16 197 768 12    # B/16 at 224 px
"""

import argparse
import functools
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vit_jax.aot.hlo import Instruction, array_shape
from vit_jax.aot.topology import Slice, use_cpu
from vit_jax.errors import UserError
from vit_jax.models import tpu_attention

# Guesses, on the safe side.
CYCLES_PER_CALL = 10_000
CYCLES_PER_GRID_STEP = 500

# Products of (L, L) with (L, d), or the like, for each head.
NUM_PRODUCTS = {"attention_forward": 2, "attention_backward": 5}


class Kernel(NamedTuple):
    """A call of the attention kernel in a compiled program.

    Attributes:
        name: a key of NUM_PRODUCTS.
        num_images, length, width, num_heads: of the queries on one device.
        dtype: such as "bfloat16".
        has_mask: whether it gets a mask.
    """

    name: str
    num_images: int
    length: int
    width: int
    num_heads: int
    dtype: str
    has_mask: bool


def find_kernel(op: Instruction, instructions: dict[str, Instruction]) -> Kernel | None:
    """Returns the kernel that an instruction calls; None if it calls none.

    Raises:
        UserError: a kernel that this file doesn't know.
    """
    if op.opcode != "custom-call" or 'custom_call_target="tpu_custom_call"' not in op.text:
        return None
    name = re.search(r"attention_(?:forward|backward)", f"{op.name} {op.text[:10_000]}")
    if name is None:
        raise UserError(
            f"The program has a kernel, {op.name}, whose cost isn't known: count it in "
            "vit_jax/aot/kernel_cost.py, or set config.model.attention_impl=xla if it is one of "
            "attention"
        )
    types = [instructions[operand].type for operand in op.operands]
    num_images, length, width = array_shape(types[0])
    # The forward pass returns the log-sum-exp, (N, groups, heads per group, L); the other takes it.
    is_forward = name[0] == "attention_forward"
    log_sums = op.type if is_forward else types[5]
    groups, heads = map(int, re.search(r"f32\[\d+,(\d+),(\d+),\d+\]", log_sums).groups())
    dtype = "bfloat16" if types[0].startswith("bf16") else "float32"
    has_mask = len(types) > (3 if is_forward else 6)
    return Kernel(name[0], num_images, length, width, groups * heads, dtype, has_mask)


def kernel_flops(kernel: Kernel) -> int:
    """Returns the operations of a kernel's matrix products."""
    products = NUM_PRODUCTS[kernel.name] * 2 * kernel.length**2 * kernel.width
    return kernel.num_images * products


def kernel_cycles(kernel: Kernel, memory_bytes: int, tpu: Slice) -> int:
    """Returns an estimate of the cycles of a call: of its schedule, or of its memory traffic."""
    columns = tpu_attention.columns_per_step(kernel.length, kernel.width, kernel.num_heads)
    grid_steps = kernel.num_images * kernel.width // columns
    arguments = (kernel.dtype, kernel.length, kernel.width, kernel.num_heads)
    step = (
        count_bundles(tpu.one_slice, *arguments, kernel.has_mask)[kernel.name]
        + CYCLES_PER_GRID_STEP
    )
    traffic = memory_bytes / tpu.chip.memory_bandwidth * tpu.chip.cycles_per_second
    return CYCLES_PER_CALL + int(max(step * grid_steps / tpu.chip.num_cores, traffic))


@functools.cache
def count_bundles(
    slice_name: str, dtype: str, length: int, width: int, num_heads: int, has_mask: bool
) -> dict[str, int]:
    """Returns {kernel: bundles of one grid step}, from a compilation in another process."""
    arguments = [slice_name, dtype, length, width, num_heads]
    command = [
        sys.executable,
        "-m",
        "vit_jax.aot.kernel_cost",
        *map(str, arguments),
        *["--mask"] * has_mask,
    ]
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        environment = os.environ | {"LIBTPU_INIT_ARGS": flags, "VIT_JAX_SCHEDULES": folder}
        root = pathlib.Path(__file__).parents[2]
        result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"Counting a kernel's bundles failed: {result.stderr[-1000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    """Compiles both kernels for one image; prints {kernel: bundles of one grid step}."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("slice")
    parser.add_argument("dtype")
    for name in ("length", "width", "num_heads"):
        parser.add_argument(name, type=int)
    parser.add_argument("--mask", action="store_true")
    args = parser.parse_args()
    if "VIT_JAX_SCHEDULES" not in os.environ:  # called by hand
        numbers = (args.length, args.width, args.num_heads)
        print(json.dumps(count_bundles(args.slice, args.dtype, *numbers, args.mask)))
        return
    use_cpu()
    device = jax.sharding.SingleDeviceSharding(Slice(args.slice).devices[0])
    shape = (1, args.length, args.width)
    x = jax.ShapeDtypeStruct(shape, jnp.dtype(args.dtype), sharding=device)
    mask = jax.ShapeDtypeStruct(shape[:2], bool, sharding=device) if args.mask else None

    def gradients(query, key, value, mask, d_out):
        def attention(*args):
            return tpu_attention.attention(*args, mask, num_heads)

        return jax.vjp(attention, query, key, value)[1](d_out)

    num_heads = args.num_heads
    jax.jit(gradients).lower(x, x, x, mask, x).compile()
    print(json.dumps({name: read_bundles(name) for name in NUM_PRODUCTS}))


def read_bundles(kernel: str) -> int:
    """Reads a kernel's number of bundles from the compiler's files."""
    folder = pathlib.Path(os.environ["VIT_JAX_SCHEDULES"])
    (path,) = folder.glob(f"*{kernel}*-schedule-analysis_final_bundles.txt")
    return int(re.search(r"total scheduled bundles:\s+(\d+)", path.read_text())[1])


if __name__ == "__main__":
    main()
