"""Messages of one line for mistakes in flags, in overrides of fields, and in presets."""

import functools
import os
import pathlib
import re
import sys
import traceback

from absl import flags

from command_line.flags import IS_GROUP
from command_line.presets import ROOT, preset_paths, with_preset_located
from vit_jax.errors import first_line

NOT_PRESETS = ("__init__.py", "common.py", "recipes.py")

# The start of absl's message about a value of a wrong type -> what the value must be.
TYPE_ERRORS = {
    "invalid literal for int": "a whole number",
    "could not convert string to float": "a number",
    "('Non-boolean argument": "True or False",
    "Error while parsing string": 'a tuple, such as "(0.5, 1.0)"',
    IS_GROUP: None,
}

# What evaluate.py takes instead of a field of the configuration.
DATASET_FLAGS = {
    "config.dataset.name": "--dataset",
    "config.dataset.data_dir": "--data_dir",
    "config.dataset.eval_split": "--split",
}

# Flags of other codebases' training scripts, and what they are here.
FOREIGN_FLAGS = {
    **{name: f"config.{name}" for name in ("seed", "batch_size", "image_size", "total_steps")},
    **dict.fromkeys(("lr", "learning_rate", "base_lr"), "config.schedule.base_lr"),
    **dict.fromkeys(("epochs", "num_epochs"), "config.num_epochs"),
    **dict.fromkeys(("data", "data_path", "dataset", "train_dir"), "config.dataset.name"),
    **dict.fromkeys(("weight_decay", "wd"), "config.optimizer.weight_decay"),
    **dict.fromkeys(("model", "arch"), "config.model.variant"),
    **dict.fromkeys(("pretrained", "init_from", "finetune"), "config.init_from"),
    **dict.fromkeys(("output", "output_dir", "out", "resume"), "workdir"),
}


def flag_error(text: str) -> str:
    """Shortens absl's message, which may contain a preset's traceback, to one line."""
    for problem, expected in TYPE_ERRORS.items():
        pattern = rf"flag --config\.([\w.]+)=(.*): {re.escape(problem)}"
        if override := re.match(pattern, text, re.DOTALL):
            field, value = override.groups()
            if problem == IS_GROUP:
                return group_error(field, value)
            return f"config.{field} is {value!r}; it must be {expected}"
    if without_preset := re.match(r"Unknown command line flag '(config\.[\w.]+)'", text):
        field = without_preset[1]
        if re.search(r"-workdir\b", " ".join(sys.argv)) and "train.py" not in sys.argv[0]:
            flag = DATASET_FLAGS.get(field)
            remedy = f"give {flag} instead of" if flag and flag[2:] in flags.FLAGS else "leave out"
            return f"--workdir takes the run's own configuration: {remedy} --{field}"
        return f"--{field} overrides a field of a preset: add --config=FILE"
    if with_value := re.match(r"flag --(\w+)=(.*): \('Non-boolean argument", text):
        name, value = with_value.groups()
        return f"--{name} is {value!r}; it takes no value: give --{name} or --no{name}"
    if foreign := re.match(r"Unknown command line flag '([\w-]+)'", text):
        field = FOREIGN_FLAGS.get(foreign[1].replace("-", "_"))
        if field and "train.py" in sys.argv[0]:
            return f"There is no flag --{foreign[1]}: give --{field}"
    if "get_config() takes 0 positional arguments" in text:
        _, _, path = next(preset_paths(sys.argv))
        return f"{path} takes no argument: leave out :ARG, or define get_config(arg=None) there"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) == 1:
        return lines[0]
    return f"{lines[0].partition(': ')[0]}: {lines[-1].removeprefix('ValueError: ')}"


def group_error(group: str, value: str) -> str:
    """Returns the message for an override of a group of fields, such as "dataset"."""
    fields = list(functools.reduce(getattr, group.split("."), flags.FLAGS["config"].value))
    example = next((name for name in ("name", "variant") if name in fields), "FIELD")
    return (
        f"--config.{group} is a group of fields: set one of them, as in "
        f"--config.{group}.{example}={value}; they are {', '.join(fields)}"
    )


def unknown_field(text: str) -> str:
    """Turns ml_collections' message about an unknown field into a sentence."""
    suggestion = re.search(r'mean "(\w+)" instead of "(\w+)"', text)
    if suggestion:
        return f"Unknown configuration field {suggestion[2]!r}: did you mean {suggestion[1]!r}?"
    name = text.strip("'\"")
    overrides = re.findall(rf"-config\.((?:\w+\.)*{re.escape(name)})\b", " ".join(sys.argv))
    field = overrides[0] if overrides else name
    return f"There is no field config.{field}; configs/common.py has all fields"


def preset_error(error: Exception) -> str | None:
    """Returns where and why a preset's own code failed; None if it isn't the preset's error."""
    if any(path.endswith(".json") for *_, path in preset_paths(sys.argv)):
        return unreadable_preset()
    frames = traceback.extract_tb(error.__traceback__)
    paths = [os.path.abspath(path) for *_, path in preset_paths(with_preset_located(sys.argv))]
    inside = [
        frame
        for frame in frames
        if os.path.abspath(frame.filename) in paths
        or pathlib.Path(frame.filename).parent == ROOT / "configs"
    ]
    if inside:
        reason = f"{type(error).__name__}: {first_line(error)[:200]}"
        if field := re.search(r'Key "(\w+)" does not exist', str(error)):
            reason = f"There is no field {field[1]!r} in this group of the configuration"
        if re.search(r'mean "\w+" instead of', str(error)):  # ml_collections lists all fields first
            reason = unknown_field(str(error))
        return f"{inside[-1].filename}, line {inside[-1].lineno}: {reason}"
    if paths and "'get_config'" in str(error):
        return f"{paths[0]} is no preset: it has no function get_config"
    return None


def unreadable_preset() -> str:
    """Returns the message for a --config that isn't a Python file, or can't be decoded as one."""
    path = next((path for *_, path in preset_paths(sys.argv)), "")
    if path.endswith(".json") and pathlib.Path(path).is_file():
        return (
            f"{path} is no preset: to resume a run, give its own --config and --workdir; "
            "evaluate.py and predict.py take --workdir alone"
        )
    if path.endswith(".py") and pathlib.Path(path).is_file():
        return f"{path} can't be read as Python: save it as UTF-8 text"
    return missing_preset()


def missing_preset() -> str:
    """Returns the message for a --config that is missing or names no file."""
    presets = sorted(path.name for path in (ROOT / "configs").glob("*.py"))
    known = ", ".join(name for name in presets if name not in NOT_PRESETS)
    given = re.search(r"-config[= ]([^: ]+)", " ".join(sys.argv))
    problem = f"There is no preset {given[1]}" if given else "--config=FILE is missing"
    return f"{problem}; configs/ has {known}"
