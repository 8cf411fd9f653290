"""Which preset --config=FILE[:ARG] names, and where it is."""

import pathlib
import re
from collections.abc import Iterator

from absl import flags

ROOT = pathlib.Path(__file__).resolve().parents[1]


def config_name() -> str | None:
    """Returns the value of --config: FILE[:ARG]."""
    flag = flags.FLAGS["config"]
    return flag.config_filename if flag.present else None


def default_workdir() -> str:
    """Returns runs/<config name>, including the config's argument: runs/vit_b16_quick."""
    path, _, arg = config_name().partition(":")
    words = [pathlib.Path(path).stem, *re.findall(r"[\w.]+", arg)]
    return str(pathlib.Path("runs") / "_".join(words))


def with_preset_located(argv: list[str]) -> list[str]:
    """Returns the arguments; a preset that isn't below the current folder is sought in ROOT."""
    argv = list(argv)
    for i, start, path in preset_paths(argv):
        if not pathlib.Path(path).exists() and (ROOT / path).is_file():
            argv[i] = argv[i][:start] + str(ROOT / path) + argv[i][start + len(path) :]
    return argv


def preset_paths(argv: list[str]) -> Iterator[tuple[int, int, str]]:
    """Yields each path in --config=PATH[:ARG]: the argument's index, the path's start, the path."""
    for i, argument in enumerate(argv[1:], start=1):
        flag = re.match("--?config=", argument)
        if flag or argv[i - 1] in ("-config", "--config"):
            start = flag.end() if flag else 0
            yield i, start, argument[start:].partition(":")[0]
