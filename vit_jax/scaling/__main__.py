"""Runs `python -m vit_jax.scaling COMMAND`."""

import sys

from vit_jax.scaling import command

sys.exit(command.main())
