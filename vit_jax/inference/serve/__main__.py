"""Runs `python -m vit_jax.inference.serve RUN [--port=PORT]`."""

import sys

from vit_jax.inference.serve import command

sys.exit(command.main())
