"""Runs `python -m vit_jax.pretrained SOURCE TARGET --format=google|timm|hf`, or `... list`."""

import sys

from vit_jax.pretrained import convert

sys.exit(convert.main())
