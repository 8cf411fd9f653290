"""Imported by the scripts before anything else: what can't wait until JAX is imported."""

import importlib.util
import signal
import sys

# While JAX is imported, Python's own handler prints a traceback on Ctrl-C, or JAX swallows it.
signal.signal(signal.SIGINT, signal.SIG_DFL)

if importlib.util.find_spec("jax") is None:
    print(
        f"JAX isn't installed for {sys.executable}: run `python start.py train` once, then "
        "`source .venv/bin/activate` in each shell",
        file=sys.stderr,
    )
    sys.exit(2)
