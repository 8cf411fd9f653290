"""Runs `python -m vit_jax.figures RUN --out=FOLDER [--images=PATH]`."""

import sys

from vit_jax.figures import command

sys.exit(command.main())
