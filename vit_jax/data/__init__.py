"""Datasets, their order and their preprocessing: the only part of vit_jax that uses TensorFlow.

TensorFlow takes seconds to import, so the modules here take it from this one, which imports it on
first use: a mistake in a flag is reported without it.
"""

import os
import sys

from etils import epy

# Before TensorFlow is imported: no startup messages, and the same arithmetic on every CPU.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")


def hide_gpus(module: str) -> None:
    """Leaves the GPUs to JAX; called when TensorFlow has been imported."""
    if module == "tensorflow":
        sys.modules[module].config.set_visible_devices([], "GPU")


with epy.lazy_imports(success_callback=hide_gpus):
    import tensorflow as tf
    import tensorflow_datasets as tfds

__all__ = ["tf", "tfds"]
