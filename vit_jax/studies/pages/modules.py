"""Imports pages and presets, and calls their functions."""

import functools
import importlib.util
import inspect
import pathlib
import sys

from vit_jax.errors import UserError, first_line


@functools.cache
def import_page(file: str):
    """Returns the module of a page or a preset.

    Raises:
        UserError: there is no such file, or its code fails.
    """
    path = pathlib.Path(file).expanduser()
    if not path.is_file() and (repository() / file).is_file():
        path = repository() / file
    if path.suffix != ".py" or not path.is_file():
        folder = repository() / "configs" / "scaling"
        known = sorted(p.name for p in folder.glob("*.py") if p.stem != "__init__")
        raise UserError(f"There is no study {file}; {folder} has {', '.join(known) or 'none'}")
    if str(repository()) not in sys.path:
        sys.path.insert(0, str(repository()))  # pages import `configs`
    spec = importlib.util.spec_from_file_location(f"study_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{file} fails: {type(error).__name__}: {first_line(error)}") from None
    return module


def call(module, function: str, arg: str):
    """Calls a page's function of an argument."""
    place = pathlib.Path(inspect.getfile(module)).name
    if not hasattr(module, function):
        raise UserError(f"{place} has no function {function}: a study's page needs it")
    try:
        return getattr(module, function)(arg or None)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{place}, {function}: {type(error).__name__}: {first_line(error)}"
        ) from None


def repository() -> pathlib.Path:
    """Returns the folder of train.py.

    Raises:
        UserError: the library is installed without the scripts.
    """
    folder = pathlib.Path(__file__).resolve().parents[3]
    if not (folder / "train.py").is_file():
        raise UserError(f"There is no {folder / 'train.py'}: run studies from a clone")
    return folder
