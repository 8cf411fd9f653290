"""Parses the command line: a preset, and the fields that override its own."""

import os
import pathlib
import re
import sys

from absl import flags
from ml_collections import ConfigDict

from command_line.exits import stop
from command_line.flags import CONFIG
from command_line.mistakes import (
    flag_error,
    missing_preset,
    preset_error,
    unknown_field,
    unreadable_preset,
)
from command_line.presets import ROOT, config_name, preset_paths, with_preset_located

# Fields for which an empty string means something.
MAY_BE_EMPTY = ("config.best_metric", "config.init_from_hint")


def parse(argv: list[str]) -> list[str]:
    """Parses flags; returns the arguments that aren't flags, after the script's name."""
    # Presets import the `configs` of this clone, whatever the current folder is.
    sys.path.insert(0, str(ROOT))
    try:
        check_single_preset(argv)
        argv, unset = without_unset(argv)
        arguments = flags.FLAGS(with_preset_located(argv))
    except (AttributeError, KeyError) as error:  # an override of an unknown field
        stop(preset_error(error) or unknown_field(str(error.args[0])))
    except flags.Error as error:
        stop(flag_error(str(error)))
    except OSError:  # an override of a field, in a preset that can't be read
        stop(missing_preset())
    except SystemExit as error:
        if isinstance(error.code, int) or error.code is None:
            raise  # --help, or `stop`
        stop(f"The preset calls sys.exit({error.code!r})")
    except SyntaxError as error:
        is_python = str(error.filename).endswith(".py")
        place = f"{error.filename}, line {error.lineno}: {error.msg}"
        stop(place if is_python else unreadable_preset())
    except Exception as error:  # in the preset's code, or --config.dataset.name.x=1
        fields = f"Overrides must name a field, as in --config.dataset.name=cifar10 ({error})"
        if field := re.search(r'because field "(\w+)" is None', str(error)):
            fields = f"config.{field[1]} is set as a whole: --config.{field[1]}=VALUE"
        stop(preset_error(error) or fields)
    check_not_empty()
    expand_home()
    prefer_num_epochs()
    if unset:
        CONFIG.value.update_from_flattened_dict(dict.fromkeys(unset))
    return arguments


def without_unset(argv: list[str]) -> tuple[list[str], list[str]]:
    """Takes out --config.FIELD=None of fields that may be None: their flags parse numbers only.

    Returns:
        The other arguments, and the fields.
    """
    given = {argument: re.fullmatch(r"--?config\.([\w.]+)=None", argument) for argument in argv}
    if not any(given.values()) or not any(preset_paths(argv)):
        return list(argv), []
    from configs import common  # `parse` has put ROOT on the path

    defaults = common.get_config()
    unset = {a: field[1] for a, field in given.items() if field and may_be_none(defaults, field[1])}
    return [argument for argument in argv if argument not in unset], list(unset.values())


def may_be_none(defaults: ConfigDict, field: str) -> bool:
    """Whether a field, by its dotted name, is None by default."""
    *groups, name = field.split(".")
    for group in groups:
        defaults = defaults.get(group)
        if not isinstance(defaults, ConfigDict):
            return False
    return defaults.get(name, "") is None


def prefer_num_epochs() -> None:
    """Lets --config.num_epochs override a preset's `total_steps`, which has precedence."""

    def is_given(field):
        return f"config.{field}" in flags.FLAGS and flags.FLAGS[f"config.{field}"].present

    if is_given("num_epochs") and not is_given("total_steps"):
        CONFIG.value.total_steps = None


def check_single_preset(argv: list[str]) -> None:
    """Stops the script if --config is given more than once."""
    if len(names := [path for *_, path in preset_paths(argv)]) > 1:
        stop(f"--config is given {len(names)} times ({', '.join(names)}): give one preset")


def expand_home() -> None:
    """Replaces ~ at the start of a flag's value, as in --workdir=~/runs: some shells don't."""
    for name in flags.FLAGS:
        flag = flags.FLAGS[name]
        if isinstance(flag.value, str) and flag.value.startswith("~"):
            flag.value = os.path.expanduser(flag.value)


def check_not_empty() -> None:
    """Stops the script if a flag is an empty string: --workdir=$FOLDER, and FOLDER isn't set."""
    for name in flags.FLAGS:
        flag = flags.FLAGS[name]
        if flag.present and flag.value in ("", [""]) and name not in MAY_BE_EMPTY:
            stop(
                f"--{name} is empty: give it a value, or leave it out (is a shell variable unset?)"
            )


def check_preset() -> None:
    """Stops the script if --config doesn't name a Python file."""
    path = (config_name() or "").partition(":")[0]
    if not path.endswith(".py") or not pathlib.Path(path).is_file():
        stop(unreadable_preset())
    if not isinstance(CONFIG.value, ConfigDict):
        stop(f"{path}: get_config returns no ConfigDict; start from that of configs/common.py")
