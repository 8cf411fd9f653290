"""The machine that a benchmark runs on: its device, versions, and what it can do at best."""

import datetime
import importlib.metadata
import os
import pathlib
import platform
import subprocess
import time

import jax
import jax.numpy as jnp

from vit_jax.aot.topology import peak_flops

PRODUCT_SIDE, PRODUCT_ROUNDS = 4096, 100  # on a CPU a quarter of the side
PACKAGES = ("jax", "flax", "torch", "timm", "transformers", "nvidia-cudnn-cu13")


def describe(dtype: str | None) -> dict:
    """Returns what this process's JAX runs on.

    Args:
        dtype: "bfloat16" or "float32"; None: float32 on a CPU, bfloat16 elsewhere.

    Returns:
        platform: "cpu", "gpu" or "tpu".
        dtype: the given one, or the one chosen.
        num_devices: how many devices there are.
        flops: the peak in `dtype`, operations per second.
        peak: where that number is from.
        machine: the device, driver, versions and date, in words.
    """
    device = jax.devices()[0]
    dtype = dtype or ("float32" if device.platform == "cpu" else "bfloat16")
    flops = peak_flops(device, dtype)
    peak = f"{device.device_kind}'s data sheet"
    if flops is None:
        flops = measured_flops(dtype)
        peak = "measured: the best product of two large matrices by XLA"
    versions = [f"{name} {version}" for name in PACKAGES if (version := version_of(name))]
    words = [device_name(device), *driver(), f"Python {platform.python_version()}", *versions]
    return dict(
        platform=device.platform,
        dtype=dtype,
        num_devices=jax.device_count(),
        flops=flops,
        peak=f"{flops / 1e12:,.3g} TFLOP/s in {dtype}, {peak}",
        machine=", ".join([*words, str(datetime.date.today())]),
    )


def measured_flops(dtype: str) -> float:
    """Returns the operations per second of the fastest of some large matrix products."""
    side = PRODUCT_SIDE if jax.devices()[0].platform != "cpu" else PRODUCT_SIDE // 4
    x = jnp.ones((side, side), dtype)
    precision = "float32" if dtype == "float32" else None
    product = jax.jit(lambda x: jnp.dot(x, x, precision=precision)).lower(x).compile()
    seconds = []
    for _ in range(PRODUCT_ROUNDS):
        start = time.perf_counter()
        product(x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / min(seconds)


def device_name(device) -> str:
    """Returns the device in words; for a CPU its model and the number of cores in use."""
    if device.platform != "cpu":
        return f"{jax.device_count()} x {device.device_kind}, of which one is used"
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":")[1].strip() for line in lines if "model name" in line), "CPU")
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def driver() -> list[str]:
    """Returns the version of NVIDIA's driver, in words, if there is one."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        output = subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError):
        return []
    return [f"driver {output.splitlines()[0].strip()}"] if output.strip() else []


def version_of(package: str) -> str | None:
    """Returns a package's version; None if it isn't installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
