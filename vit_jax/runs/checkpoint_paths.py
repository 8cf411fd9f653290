"""The names of a run's checkpoints: a step, "best" or "latest", also in paths into its folder.

runs/digits                           the latest that can be read
runs/digits/checkpoints/1500          a step
runs/digits/checkpoints/best          of the best evaluation; or /latest
runs/digits/checkpoints/1500/params   an item: the parameters, or `ema_params`, their average
"""

import os
from typing import NamedTuple

from etils import epath

from vit_jax.errors import UserError
from vit_jax.storage.files import open_path

NAMES = ("best", "latest")
ITEMS = ("params", "ema_params")


class RunPath(NamedTuple):
    """What a path into a run's folder names; None for what it doesn't."""

    workdir: epath.Path
    step: int | str | None
    item: str | None


def parse_step(step: int | str, field: str = "step") -> int | str:
    """Returns a step as an int, "best" or "latest".

    Args:
        step: an int, or text.
        field: what messages call it.

    Raises:
        UserError: it is none of these.
    """
    if step in NAMES:
        return step
    if not isinstance(step, bool) and str(step).isdecimal():
        return int(step)
    raise UserError(f"{field} is {step!r}; it must be a step, 'best' or 'latest'")


def parse_run_path(path) -> RunPath | None:
    """Returns what a path into a run's folder names; None for another path."""
    path = open_path(os.path.expanduser(path))
    if (path / "checkpoints").exists():
        return RunPath(path, None, None)
    item = None
    if path.name in ITEMS:
        path, item = path.parent, path.name
    is_step = path.name.isdecimal() or (path.name in NAMES and not path.exists())
    if path.parent.name == "checkpoints" and is_step:
        return RunPath(path.parent.parent, parse_step(path.name), item)
    return None


def at_step(path, step: int | str | None, flag: str = "--step"):
    """Returns the path of a run's checkpoint; `path` itself if `step` is None.

    Raises:
        UserError: a step is given, but the path isn't a run's folder.
    """
    if step is None:
        return path
    step, run = parse_step(step, flag), parse_run_path(path)
    if run is None or run.step is not None or run.item is not None:
        raise UserError(f"{flag} is {step}, but {path} is not a run's folder: give one, or no step")
    return os.path.join(path, "checkpoints", str(step))
