"""The Vision Transformers of transformers."""

from vit_jax.pretrained.codebases.hf.names import PREFIXES, WITH_OTHER_PARTS
from vit_jax.pretrained.codebases.hf.reading import FAMILIES, read
from vit_jax.pretrained.codebases.hf.writing import keeps_mask_token, representable, write

__all__ = [
    "FAMILIES",
    "PREFIXES",
    "WITH_OTHER_PARTS",
    "keeps_mask_token",
    "read",
    "representable",
    "write",
]
