"""The implementations that `train_step.py` measures, with the same model, batch and optimizer.

A class token, GELU by tanh, 1,000 classes, no dropout; AdamW with float32 moments, weight decay 0.1
on matrices, and gradients clipped at norm 1; random images that are on the device already. With
"bfloat16", parameters are float32 and matrix products bfloat16: `dtype` in JAX, autocast in
PyTorch.
"""

import importlib
import importlib.util
import os
from typing import NamedTuple

import numpy as np

from vit_jax.models import variants

NUM_CLASSES, LEARNING_RATE, WEIGHT_DECAY, CLIP_NORM = 1000, 1e-4, 0.1, 1.0
PARTS = ("forward", "gradients", "step")  # "gradients": forward and backward


class Settings(NamedTuple):
    """What is measured: a model such as "S/16", and its batches."""

    model: str
    image_size: int
    batch_size: int
    dtype: str  # "bfloat16" or "float32"


class Peer(NamedTuple):
    """Where an implementation is: the function in benchmarks/, its arguments, what it needs."""

    module: str
    function: str
    package: str
    arguments: dict = {}


PEERS = {
    "ours": Peer("jax_peers", "ours", "jax"),
    "ours_xla": Peer("jax_peers", "ours", "jax", {"attention_impl": "xla"}),
    "flax": Peer("jax_peers", "textbook", "flax"),
    "timm": Peer("torch_peers", "timm", "timm"),
    "timm_compiled": Peer("torch_peers", "timm", "timm", {"compiles": True}),
    "transformers": Peer("torch_peers", "transformers", "transformers"),
}


def create(name: str, settings: Settings):
    """Returns a JaxPeer or a TorchPeer, its whole step compiled."""
    peer = PEERS[name]
    module = importlib.import_module(f"benchmarks.{peer.module}")
    return getattr(module, peer.function)(settings, **peer.arguments)


def installed() -> list[str]:
    """Returns the names of the peers whose packages are installed."""
    return [name for name, peer in PEERS.items() if importlib.util.find_spec(peer.package)]


def fields(settings: Settings) -> dict:
    """Returns the model's patch_size, width, depth, num_heads and mlp_dim."""
    return variants.fields(settings.model)


def random_batch(settings: Settings) -> dict[str, np.ndarray]:
    """Returns uint8 `images` (N, H, W, 3) and int32 `labels` (N,), the same for every peer."""
    rng = np.random.default_rng(0)
    shape = (settings.batch_size, settings.image_size, settings.image_size, 3)
    labels = rng.integers(0, NUM_CLASSES, settings.batch_size, np.int32)
    return {"images": rng.integers(0, 256, shape, np.uint8), "labels": labels}


def num_cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))
