"""Writing pages of studies for tests."""

import pathlib

from vit_jax.studies import pages

ROOT = pathlib.Path(__file__).resolve().parents[2]
STUDIES = sorted(
    path.stem for path in (ROOT / "configs/scaling").glob("*.py") if path.stem != "__init__"
)
TEMPLATE = """
from configs import digits

def get_config(arg=None):
    return digits.get_config(arg)

def get_study(arg=None):
    return {study!r}
"""


def write_page(folder: pathlib.Path, study: dict, name: str = "page.py") -> str:
    """Writes a page whose base is the digits preset; returns FILE:quick."""
    path = folder / name
    path.write_text(TEMPLATE.format(study=study))
    pages.import_page.cache_clear()
    pages.configuration.cache_clear()
    return f"{path}:quick"


def load(folder, study: dict) -> pages.Study:
    return pages.load(write_page(folder, study))
