"""The Vision Transformer in JAX and Flax.

The modules `models`, `pretrained`, `checkpoint` and `optim`, the classes `Classifier` and
`Exported` and the function `features` are imported on first use. Requires the packages in
requirements-library.txt; only `vit_jax.data` requires TensorFlow. `Exported` requires only JAX,
NumPy, safetensors and etils.
"""

import importlib
import importlib.util
import sys

LAZY = {
    "Classifier": "vit_jax.inference.classifier",
    "Exported": "vit_jax.inference.export",
    "checkpoint": "vit_jax.runs.checkpoint",
    "features": "vit_jax.inference.features",
    "models": "vit_jax.models",
    "optim": "vit_jax.training.optim",
    "pretrained": "vit_jax.pretrained",
}
MODULES = ("checkpoint", "models", "optim", "pretrained")  # the others are in such a module


def exit_without_jax() -> None:
    """Ends the program with one line if JAX isn't installed."""
    if importlib.util.find_spec("jax") is None:
        print(
            f"JAX isn't installed for {sys.executable}: run `python start.py train` once, then "
            "`source .venv/bin/activate` in each shell",
            file=sys.stderr,
        )
        sys.exit(2)


if sys.argv[:1] == ["-m"]:  # Python is looking for a module of this package to run
    exit_without_jax()


def __getattr__(name: str):
    if name not in LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(LAZY[name])
    return module if name in MODULES else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *LAZY})
