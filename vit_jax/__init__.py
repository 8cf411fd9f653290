"""The Vision Transformer in JAX and Flax."""


def __getattr__(name: str):
    """`vit_jax.Classifier`, imported when it is asked for."""
    if name == "Classifier":
        from vit_jax.classifier import Classifier

        return Classifier
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
