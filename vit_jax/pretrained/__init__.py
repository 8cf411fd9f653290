"""Weights of other codebases: `open` reads a model of any of them, `load` the parameters of a given
model; `save` writes them.

`python -m vit_jax.pretrained SOURCE TARGET --format=hf` converts between formats.
"""

from vit_jax.pretrained.adapt import image_size_of
from vit_jax.pretrained.export import save
from vit_jax.pretrained.loading import check, from_config, load
from vit_jax.pretrained.loading import open_model as open

__all__ = ["check", "from_config", "image_size_of", "load", "open", "save"]
