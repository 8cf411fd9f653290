"""Descriptions of NVIDIA GPUs: devices to compile for, and what the cards can do."""

import dataclasses
import importlib.metadata
import importlib.util
import math

import jax
from jax.experimental import topologies

from vit_jax.errors import UserError, first_line
from vit_jax.training.program import USABLE_SHARE

GIB = 2**30
MIB = 2**20
TERA = 1e12

# What JAX's memory pool can't have: the CUDA context and loaded kernels, the workspaces of cuBLAS
# and cuDNN, NCCL's buffers. A guess, on the safe side.
OUTSIDE_POOL = 2 * GIB
# The share of a GPU's memory that JAX's pool has by default: docs.jax.dev/en/latest/
# gpu_memory_allocation.html
DEFAULT_POOL = 0.75
CUDA_RUNTIME = (13, 0)


@dataclasses.dataclass(frozen=True)
class Card:
    """A model of NVIDIA GPU.

    Attributes:
        kind: the name that CUDA gives it.
        compute_capability: (major, minor).
        num_cores: streaming multiprocessors.
        clock_ghz: boost clock.
        memory_bytes: as CUDA reports it: less than the nominal size.
        memory_bandwidth: bytes per second.
        l2_bytes: the size of the L2 cache.
        flops: operations per second of dense matrix products, by the type of their operands:
            "bf16" (float16 too), "tf32", and "f32" for products that must keep float32 precision.
    """

    kind: str
    compute_capability: tuple[int, int]
    num_cores: int
    clock_ghz: float
    memory_bytes: int
    memory_bandwidth: float
    l2_bytes: int
    flops: dict[str, float]


def peaks(bf16: float, tf32: float, f32: float) -> dict[str, float]:
    """Returns `Card.flops` from figures in TFLOPS."""
    return {"bf16": bf16 * TERA, "tf32": tf32 * TERA, "f32": f32 * TERA}


# Speeds and bandwidths are from NVIDIA's data sheets (of the SXM cards, without sparsity): "NVIDIA
# A100 Tensor Core GPU", "H100 Tensor Core GPU", "H200 Tensor Core GPU", "Blackwell Architecture
# Technical Brief" (HGX B200), "L4 Tensor Core GPU"; the RTX 4090's from "Ada GPU Architecture".
# The numbers of cores, clocks and L2 caches are from the same, or from OpenXLA's descriptions of
# these cards (xla/backends/gpu/target_config/specs), as is the memory of H100, A100 and B200; that
# of the others is the total that CUDA's users report.
HOPPER = peaks(989.4, 494.7, 66.9)
AMPERE = peaks(312, 156, 19.5)
CARDS = {
    "h100": Card(
        *("NVIDIA H100 80GB HBM3", (9, 0), 132, 1.98),
        *(84_942_979_072, 3.352e12, 50 * MIB, HOPPER),
    ),
    "h200": Card(
        *("NVIDIA H200", (9, 0), 132, 1.98),
        *(int(139.8 * GIB), 4.8e12, 50 * MIB, HOPPER),
    ),
    "b200": Card(
        *("NVIDIA B200", (10, 0), 148, 1.965),
        *(191_514_411_008, 8e12, 132_644_864, peaks(2250, 1100, 80)),
    ),
    "a100-80": Card(
        *("NVIDIA A100-SXM4-80GB", (8, 0), 108, 1.41),
        *(85_100_068_864, 2.039e12, 40 * MIB, AMPERE),
    ),
    "a100-40": Card(
        *("NVIDIA A100-SXM4-40GB", (8, 0), 108, 1.41),
        *(42_331_013_120, 1.555e12, 40 * MIB, AMPERE),
    ),
    "l4": Card(
        *("NVIDIA L4", (8, 9), 58, 2.04),
        *(int(22.03 * GIB), 300e9, 48 * MIB, peaks(121, 60, 30.3)),
    ),
    "rtx4090": Card(
        *("NVIDIA GeForce RTX 4090", (8, 9), 128, 2.52),
        *(int(23.64 * GIB), 1.008e12, 72 * MIB, peaks(165.2, 82.6, 82.6)),
    ),
}
GPUS_PER_HOST = 8  # at most

# Per core, by compute capability: CUDA C++ Programming Guide, "Technical Specifications per Compute
# Capability": (threads, float32 units, bytes of shared memory).
CORES = {
    (8, 0): (2048, 64, 164 * 1024),
    (8, 9): (1536, 128, 100 * 1024),
    (9, 0): (2048, 128, 228 * 1024),
    (10, 0): (2048, 128, 228 * 1024),
}


class Gpus:
    """Hosts with GPUs, described rather than present. It can be used like `topology.Slice`.

    Attributes:
        name: such as "h100:8".
        card: the model of GPU.
        devices: for `create_mesh`; programs can be compiled for them, but not run.
        packages: the packages whose versions determine the compiled program.
        compiler_threads: how many programs to compile at once.
    """

    packages = ("jax", "jax-cuda13-plugin", "nvidia-cudnn-cu13")
    compiler_threads = 3
    groups = "hosts"  # what the slow links are between
    num_slices = 1

    def __init__(self, name: str, card: Card, shape: tuple[int, ...]):
        """Describes GPUs; requires XLA's GPU compiler, but no GPU and no driver.

        Args:
            name: as the user wrote it, for messages.
            card: the model of GPU.
            shape: (GPUs,) of one host, or (hosts, GPUs per host).

        Raises:
            UserError: the compiler isn't installed, or doesn't start.
        """
        self.name, self.card = name, card
        if importlib.util.find_spec("jax_cuda13_plugin") is None:
            raise UserError(
                f"--compile_for={name} requires XLA's compiler for GPUs: "
                f"pip install 'jax[cuda13]=={jax.__version__}'"
            )
        hosts, per_host = shape if len(shape) > 1 else (1, *shape)
        try:
            description = topologies.get_topology_desc(
                platform="cuda",
                topology_name=name,
                topology=f"1x{hosts}x{per_host}",  # groups of hosts x hosts x GPUs
                target_config=target_config(card),
            )
        except (RuntimeError, ValueError, NotImplementedError) as error:
            raise UserError(
                f"--compile_for={name}: XLA's compiler for GPUs doesn't start; are the packages of "
                f"pip install 'jax[cuda13]=={jax.__version__}' installed? ({first_line(error)})"
            ) from None
        self.devices = description.devices

    @property
    def memory_bytes(self) -> int:
        """What a program may use: JAX's memory pool, set as large as it can be."""
        return int(self.card.memory_bytes * self.largest_pool)

    @property
    def largest_pool(self) -> float:
        """The largest share of a GPU's memory that JAX's pool can have, in whole percent."""
        return math.floor(100 * (1 - OUTSIDE_POOL / self.card.memory_bytes)) / 100

    def environment(self, required: int) -> dict[str, str]:
        """Returns the environment variables that a run needs to have so many bytes per GPU."""
        if required <= USABLE_SHARE * DEFAULT_POOL * self.card.memory_bytes:
            return {}
        return {"XLA_CLIENT_MEM_FRACTION": f"{self.largest_pool:.2f}"}


def target_config(card: Card) -> str:
    """Returns a card's description for XLA: a GpuTargetConfigProto, as text."""
    major, minor = card.compute_capability
    threads, fpus, shared_memory = CORES[card.compute_capability]
    features = "ACCELERATED_FEATURES" if major >= 9 else "NONE"
    cudnn = importlib.metadata.version("nvidia-cudnn-cu13").split(".")
    return f"""
        gpu_device_info {{
          cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {features} }}
          core_count: {card.num_cores}
          fpus_per_core: {fpus}
          clock_rate_ghz: {card.clock_ghz}
          device_memory_size: {card.memory_bytes}
          memory_bandwidth: {card.memory_bandwidth:.0f}
          l2_cache_size: {card.l2_bytes}
          threads_per_warp: 32
          threads_per_block_limit: 1024
          threads_per_core_limit: {threads}
          shared_memory_per_core: {shared_memory}
          shared_memory_per_block: 49152
          shared_memory_per_block_optin: {shared_memory - 1024}
          registers_per_core_limit: 65536
          registers_per_block_limit: 65536
          block_dim_limit_x: 2147483647
          block_dim_limit_y: 65535
          block_dim_limit_z: 65535
        }}
        platform_name: "CUDA"
        device_description_str: "{card.kind}"
        dnn_version_info {{ major: {cudnn[0]} minor: {cudnn[1]} patch: {cudnn[2]} }}
        runtime_version {{ major: {CUDA_RUNTIME[0]} minor: {CUDA_RUNTIME[1]} patch: 0 }}
    """
