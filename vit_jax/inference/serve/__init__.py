"""Classifies images over HTTP.

    python -m vit_jax.inference.serve runs/digits --port=8000
    curl --data-binary @digit.png http://127.0.0.1:8000/classify
    curl -F a=@digit_0.png -F b=@digit_1.png "http://127.0.0.1:8000/classify?top=3"

`http://127.0.0.1:8000/` is a page to drop images on. docs/deploy.md has the answers, the limits and
their statuses. Needs the packages in requirements-serve.txt; for an exported artifact, neither
Flax nor optax.
"""

from vit_jax.inference.serve.app import create_app
from vit_jax.inference.serve.command import create_server, listen, main
from vit_jax.inference.serve.limits import Limits

__all__ = ["Limits", "create_app", "create_server", "listen", "main"]
