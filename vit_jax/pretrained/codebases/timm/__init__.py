"""timm's `VisionTransformer` and `Eva`."""

from vit_jax.pretrained.codebases.timm.reading import read
from vit_jax.pretrained.codebases.timm.writing import (
    keeps_mask_token,
    representable,
    write,
    writes_file,
)

__all__ = ["keeps_mask_token", "read", "representable", "write", "writes_file"]
