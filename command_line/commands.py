"""Commands to paste into a shell."""

import pathlib
import shlex
import shutil
import sys

from command_line.presets import ROOT


def command(script: str, *arguments: str) -> str:
    """Returns the command, for a shell in the current folder, that runs a script of this clone.

    Args:
        script: such as "train.py"; or "-m", and a module follows.
        *arguments: the script's arguments; quoted where a shell needs it.
    """
    on_path = shutil.which("python") == sys.executable
    python = "python" if on_path else from_here(pathlib.Path(sys.executable))
    script = script if script == "-m" else from_here(ROOT / script)
    return shlex.join([python, script, *arguments])


def arguments_without(*names: str) -> list[str]:
    """Returns the command line's arguments without some flags and their values."""
    kept, arguments = [], iter(sys.argv[1:])
    for argument in arguments:
        name, has_value, _ = argument.lstrip("-").partition("=")
        if not (argument.startswith("-") and name in names):
            kept.append(argument)
        elif not has_value:
            next(arguments, None)
    return kept


def from_here(path: pathlib.Path) -> str:
    """Returns a path relative to the current folder, if it is below it."""
    folder = pathlib.Path.cwd()
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path)
