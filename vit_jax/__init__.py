"""The Vision Transformer in JAX and Flax.

The modules `models`, `pretrained`, `checkpoint` and `optim` and the classes `Classifier` and
`Exported` are imported on first use. Requires the packages in requirements-library.txt; only
`vit_jax.data` requires TensorFlow. `Exported` requires only JAX, NumPy, safetensors and etils.
"""

import importlib

LAZY = {
    "Classifier": "vit_jax.inference.classifier",
    "Exported": "vit_jax.inference.export",
    "checkpoint": "vit_jax.runs.checkpoint",
    "models": "vit_jax.models",
    "optim": "vit_jax.training.optim",
    "pretrained": "vit_jax.pretrained",
}


def __getattr__(name: str):
    if name not in LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(LAZY[name])
    return getattr(module, name) if name in ("Classifier", "Exported") else module


def __dir__() -> list[str]:
    return sorted({*globals(), *LAZY})
