"""timm's `VisionTransformer` and `Eva`."""

from vit_jax.pretrained.codebases.timm.reading import read
from vit_jax.pretrained.codebases.timm.writing import representable, write

__all__ = ["read", "representable", "write"]
