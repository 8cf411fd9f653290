"""Arrows go one way: what each part of the code may import."""

import ast
import pathlib
import subprocess
import sys

import pytest

from configs import common
from vit_jax import models

ROOT = pathlib.Path(__file__).parents[1]


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


@pytest.mark.parametrize(
    ("pattern", "forbidden"),
    [
        ("vit_jax/**/*.py", ("tensorflow", "absl", "configs", "input_pipeline", "sources")),
        ("configs/*.py", ("vit_jax", "jax", "tensorflow", "absl", "input_pipeline")),
        ("input_pipeline.py", ("jax", "vit_jax.models", "configs", "absl")),
        ("sources.py", ("jax", "vit_jax.models", "configs", "absl")),
        ("shuffle.py", ("jax", "vit_jax", "configs", "absl")),
        ("damage.py", ("jax", "vit_jax.models", "configs", "absl")),
        ("preprocess.py", ("jax", "vit_jax.models", "configs", "absl")),
    ],
)
def test_imports(pattern, forbidden):
    files = list(ROOT.glob(pattern))
    assert files
    for path in files:
        for module in imported(path):
            inside = [name for name in forbidden if f"{module}.".startswith(f"{name}.")]
            assert not inside, f"{path} imports {module}"


def test_the_library_needs_no_tensorflow():
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in (ROOT / "vit_jax").rglob("*.py")
        if path.stem != "__init__"
    ]
    code = f"import sys, {', '.join(modules)}; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_every_model_field_can_be_configured():
    """Beside those that have fields of their own: num_classes and dtype."""
    configured = set(common.get_config().model) - {"variant"}
    assert configured == set(models.FIELDS) - {"num_classes", "dtype"}
    defaults = {f: models.VisionTransformer.__dataclass_fields__[f].default for f in configured}
    for name, value in common.get_config().model.items():
        if value is not None and name != "variant":
            assert value == defaults[name], name


def test_a_preset_cannot_assign_to_a_field_that_is_not_there():
    config = common.get_config()
    with pytest.raises(AttributeError, match='Did you mean "weight_decay"'):
        config.optimizer.weight_decy = 0.3


def test_presets_do_not_share_what_they_change():
    common.quick(common.get_config())
    assert common.get_config().model.depth is None
