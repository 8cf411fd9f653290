"""Runs `python -m vit_jax.pretrained SOURCE TARGET --format=google|timm|hf`."""

import sys

from vit_jax.pretrained import convert

sys.exit(convert.main())
