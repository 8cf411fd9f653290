"""The Vision Transformers of transformers."""

from vit_jax.pretrained.codebases.hf.names import PREFIXES, WITH_OTHER_PARTS
from vit_jax.pretrained.codebases.hf.reading import FAMILIES, read, vision_config
from vit_jax.pretrained.codebases.hf.writing import (
    keeps_mask_token,
    representable,
    write,
    writes_file,
)

__all__ = [
    "FAMILIES",
    "PREFIXES",
    "WITH_OTHER_PARTS",
    "keeps_mask_token",
    "read",
    "representable",
    "vision_config",
    "write",
    "writes_file",
]
