"""Sets up .venv in this folder, once, and trains or tests in it. Needs Python 3.11+ and pip.

    python start.py train    trains a ViT on the embedded digits (two minutes)
    python start.py test     runs the tests
    python start.py compile  tells whether a B/16 fits sixteen TPU chips, by the TPU's compiler

What follows is passed on: python start.py train --config=configs/vit_b16.py:quick
"""

import hashlib
import importlib.util
import os
import pathlib
import subprocess
import sys
import venv

HERE = pathlib.Path(__file__).resolve().parent
VENV = HERE / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

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
    if not (3, 11) <= sys.version_info < (3, 14):  # whoever runs this may have any
        return complain(f"Python 3.11 to 3.13 is needed; this is {sys.version.split()[0]}")
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        return complain(f"Usage: python start.py {' | '.join(COMMANDS)}")
    requirements, command, defaults = COMMANDS[sys.argv[1]]
    if not install(requirements):
        return complain(f"Installing {requirements} failed: pip says why above")
    arguments = sys.argv[2:] or defaults
    return subprocess.run([PYTHON, *command, *arguments], cwd=HERE).returncode


def install(requirements: str) -> bool:
    """Brings .venv up to the requirements; does nothing where they are met already."""
    texts = [path.read_bytes() for path in sorted(HERE.glob("requirements*.txt"))]
    digest = hashlib.sha256(b"".join(texts)).hexdigest()
    stamp = VENV / f"{requirements}.sha256"
    if PYTHON.exists() and stamp.exists() and stamp.read_text() == digest:
        return True
    print(f"Installing {requirements} into {VENV} ...", flush=True)
    # Some systems ship venv without pip for it; then this Python's own pip serves.
    own_pip = importlib.util.find_spec("ensurepip") is not None
    if not PYTHON.exists():
        venv.create(VENV, with_pip=own_pip)
    pip = [PYTHON, "-m", "pip"] if own_pip else [sys.executable, "-m", "pip", "--python", PYTHON]
    options = ["--quiet", "--disable-pip-version-check"]
    done = subprocess.run([*pip, "install", *options, "-r", HERE / requirements]).returncode == 0
    if done:
        stamp.write_text(digest)
    return done


def complain(message: str) -> int:
    print(message, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
