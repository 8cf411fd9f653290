"""Imported by the scripts before anything else: what can't wait until JAX is imported."""

import signal

import vit_jax

# While JAX is imported, Python's own handler prints a traceback on Ctrl-C, or JAX swallows it.
signal.signal(signal.SIGINT, signal.SIG_DFL)

vit_jax.exit_without_jax()
