"""Runs `python -m vit_jax.report RUN`."""

import sys

from vit_jax.report import page

sys.exit(page.main())
