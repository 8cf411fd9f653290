"""Sets up a virtual environment in .venv, once, and runs a command in it.

    python start.py train    trains a small ViT on the embedded digits, in under two minutes
    python start.py test     runs the tests
    python start.py compile  reports whether B/16 fits 16 TPU chips, according to the TPU's compiler

Arguments are passed on: python start.py train --config=configs/vit_b16.py:quick
A file or folder of the code selects its tests: python start.py test vit_jax/models train.py
Requires Python 3.11 to 3.13 and pip.
"""

import hashlib
import importlib.util
import os
import pathlib
import subprocess
import sys
import venv

ROOT = pathlib.Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

# Command -> requirements, arguments of Python, default arguments of the script.
COMMANDS = {
    "train": ("requirements.txt", ["train.py"], ["--config=configs/digits.py"]),
    "test": ("requirements-dev.txt", ["-m", "pytest"], []),
    "compile": (
        "requirements-compile.txt",
        ["train.py"],
        ["--config=configs/vit_b16.py", "--compile_for=v5e:4x4"],
    ),
}


def main() -> int:
    # The rest of this file must parse in older versions too, for this message to appear.
    if not (3, 11) <= sys.version_info < (3, 14):
        return print_error(f"Python 3.11 to 3.13 is required; this is {sys.version.split()[0]}")
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        return print_error(f"Usage: python start.py {' | '.join(COMMANDS)} [ARGUMENT...]")
    requirements, command, defaults = COMMANDS[sys.argv[1]]
    arguments = sys.argv[2:] or defaults
    if sys.argv[1] == "test":
        for path in arguments:
            if path.endswith((".py", "/")) and not (ROOT / path).exists():
                return print_error(f"There is no {path}: name a file or folder of the code")
        arguments = test_arguments(arguments)
    try:
        if not install(requirements):
            return print_error(f"Installing {requirements} failed; pip's message is above")
    except KeyboardInterrupt:
        print_error("Interrupted: the same command goes on with the installation")
        return 130
    if sys.argv[1] == "test":
        return subprocess.run([PYTHON, *command, *arguments], cwd=ROOT).returncode
    # In the current folder, which paths among the arguments are relative to.
    script, *rest = command
    return subprocess.run([PYTHON, ROOT / script, *rest, *arguments]).returncode


def test_arguments(arguments: list) -> list:
    """Replaces the files and folders of the code by their tests; keeps pytest's own arguments."""
    values = {i + 1 for i, argument in enumerate(arguments) if argument in ("-k", "-m")}
    return [argument if i in values else tests_of(argument) for i, argument in enumerate(arguments)]


def tests_of(argument: str) -> str:
    """Returns the tests of a file or folder of the code; anything else unchanged.

    vit_jax/models -> tests/models, train.py -> tests/test_train.py. A file without tests of its
    own selects the tests of its folder.
    """
    path = (ROOT / argument).resolve()
    is_code = path.is_dir() or path.suffix == ".py"
    if not path.exists() or not is_code or ROOT not in path.parents:
        return argument
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] == "tests":
        return argument
    if parts[0] == "vit_jax":
        parts = parts[1:]
    tests = ROOT / "tests"
    while parts:
        folder = tests.joinpath(*parts[:-1])
        for candidate in (folder / f"test_{parts[-1]}.py", folder / parts[-1]):
            if candidate.exists():
                return candidate.relative_to(ROOT).as_posix()
        parts.pop()
    return "tests"


def install(requirements: str) -> bool:
    """Installs the requirements into .venv unless they already are; returns whether it worked."""
    texts = [path.read_bytes() for path in sorted(ROOT.glob("requirements*.txt"))]
    digest = hashlib.sha256(b"".join(texts)).hexdigest()
    stamp = VENV / f"{requirements}.sha256"
    if PYTHON.exists() and stamp.exists() and stamp.read_text() == digest:
        return True
    print(f"Installing {requirements} into {VENV} ...", flush=True)
    # Some systems lack ensurepip: this Python's own pip then installs into .venv.
    has_ensurepip = importlib.util.find_spec("ensurepip") is not None
    if not PYTHON.exists():
        venv.create(VENV, with_pip=has_ensurepip)
    elif has_ensurepip and not has_pip():
        subprocess.run([PYTHON, "-m", "ensurepip"])  # its creation was interrupted
    pip = [PYTHON, "-m", "pip"]
    if not has_ensurepip:
        pip = [sys.executable, "-m", "pip", "--python", PYTHON]
    options = ["--quiet", "--disable-pip-version-check"]
    installed = subprocess.run([*pip, "install", *options, "-r", ROOT / requirements])
    if installed.returncode == 0:
        stamp.write_text(digest)
    return installed.returncode == 0


def has_pip() -> bool:
    """Whether pip can be imported in .venv."""
    found = subprocess.run([PYTHON, "-c", "import pip"], stderr=subprocess.DEVNULL)
    return found.returncode == 0


def print_error(message: str) -> int:
    """Prints a message and returns the exit code of a user error."""
    print(message, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
