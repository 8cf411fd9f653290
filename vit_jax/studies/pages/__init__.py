"""Pages of studies: Python files that are a preset and say which runs of it to compare.

schema.py says what a page has.
"""

from vit_jax.studies.pages.cell import Cell
from vit_jax.studies.pages.modules import import_page, repository
from vit_jax.studies.pages.presets import configuration, configured
from vit_jax.studies.pages.schema import plain
from vit_jax.studies.pages.study import Study, load

__all__ = [
    "Cell",
    "Study",
    "configuration",
    "configured",
    "import_page",
    "load",
    "plain",
    "repository",
]
