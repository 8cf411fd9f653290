"""Weights of other codebases: `load` reads any of their formats, `save` writes them.

`python -m vit_jax.pretrained SOURCE TARGET --format=hf` converts between formats.
"""

from vit_jax.pretrained.export import save
from vit_jax.pretrained.loading import check, from_config, image_size_of, load

__all__ = ["check", "from_config", "image_size_of", "load", "save"]
