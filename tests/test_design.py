"""The layout's rules: imports go one way, rooms (the folders in vit_jax) stay small."""

import ast
import graphlib
import pathlib
import subprocess
import sys
import tomllib

import pytest

import vit_jax
from configs import common

ROOT = pathlib.Path(__file__).parents[1]

# A room may import the rooms before it, and the files at the root of vit_jax. A folder in a room is
# a room of its own.
ROOMS = (
    "storage",
    "parallel",
    "models",
    "data.preprocess",
    "data",
    "objectives",
    "training",
    "runs",
    "logs",
    "pretrained.codebases",
    "pretrained.codebases.timm",
    "pretrained.codebases.hf",
    "pretrained",
    "inference",
    "inference.serve",
    "evaluation",
    "figures",
    "report",
    "studies.pages",
    "studies",
    "scaling",
    "aot",
)
SCRIPTS = (
    "train",
    "evaluate",
    "predict",
    "start",
    "command_line",
    "configuration",
    "summary",
    "input_pipeline",
)


def module_name(path: pathlib.Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


MODULES = {
    module_name(path): path
    for pattern in ("*.py", "command_line/*.py", "vit_jax/**/*.py", "configs/**/*.py")
    for path in ROOT.glob(pattern)
}


# Parsed before any test runs: in CPython 3.11, `ast.parse` can fail beside other threads that use
# it (github.com/python/cpython/issues/106905).
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


def imports(module: str, inside_functions: bool = True) -> set[str]:
    """Returns the modules that a module imports; for `from a import b`, "a" and "a.b"."""
    tree = TREES[module]
    found = set()
    for node in ast.walk(tree) if inside_functions else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    lazy = {f"vit_jax.{name}": module for name, module in vit_jax.LAZY.items()}
    return {lazy.get(name, name) for name in found}


def room(module: str) -> str | None:
    """Returns the room of a module of the library; None: it is at the root or elsewhere."""
    around = [name for name in ROOMS if is_part_of(module, [f"vit_jax.{name}"])]
    return max(around, key=len, default=None)


def is_part_of(module: str, packages) -> bool:
    return any(f"{module}.".startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize("module", [name for name in MODULES if room(name)])
def test_rooms_import_only_the_rooms_before_them(module):
    # The __init__ of data has only TensorFlow, which its folders import from there.
    for imported in imports(module).intersection(MODULES) - {"vit_jax.data"}:
        if other := room(imported):
            assert ROOMS.index(other) <= ROOMS.index(room(module)), f"{module} imports {imported}"


def test_every_room_is_known():
    packages = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    rooms = {name.removeprefix("vit_jax.") for name in packages if name.startswith("vit_jax.")}
    assert rooms == set(ROOMS)


@pytest.mark.parametrize(
    ("importers", "forbidden"),
    [
        ("vit_jax", ("configs", "absl", *SCRIPTS)),
        ("configs", ("vit_jax", "jax", "tensorflow", "absl", *SCRIPTS)),
        ("vit_jax.pretrained.codebases.hf", ("vit_jax.pretrained.codebases.timm",)),
        ("input_pipeline", ("train", "evaluate", "predict", "configs")),
    ],
)
def test_nothing_imports_what_depends_on_it(importers, forbidden):
    for module in MODULES:
        if is_part_of(module, [importers]):
            for imported in imports(module):
                assert not is_part_of(imported, forbidden), f"{module} imports {imported}"


def test_only_data_imports_tensorflow():
    for module in MODULES:
        if is_part_of(module, ["vit_jax"]) and not is_part_of(module, ["vit_jax.data"]):
            for imported in imports(module):
                forbidden = ("tensorflow", "tensorflow_datasets", "vit_jax.data")
                assert not is_part_of(imported, forbidden), f"{module} imports {imported}"


def test_data_imports_no_model():
    for module in [name for name in MODULES if is_part_of(name, ["vit_jax.data"])]:
        for imported in imports(module):
            assert not is_part_of(imported, ("jax", "vit_jax.models")), f"{module}: {imported}"


def test_the_input_pipeline_imports_jax_only_to_draw():
    for imported in imports("input_pipeline", inside_functions=False):
        assert not is_part_of(imported, ("jax", "vit_jax.models", "vit_jax.training"))


def test_scripts_import_no_preset():
    for module in [name for name in MODULES if is_part_of(name, SCRIPTS)]:
        presets = {name for name in imports(module) if name.startswith("configs.")}
        assert presets <= {"configs.common"}, module


def test_there_are_no_import_cycles():
    graph = {
        name: {i for i in imports(name) if i in MODULES and not f"{name}.".startswith(f"{i}.")}
        for name in MODULES
    }
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def test_no_room_has_more_than_eight_files():
    for folder in ROOT.glob("vit_jax/**/"):
        files = [path for path in folder.glob("*.py") if not path.name.startswith("__")]
        assert len(files) <= 8, folder


def test_the_library_needs_only_its_own_requirements():
    """vit_jax and every room but data can be imported without TensorFlow."""
    modules = [
        name
        for name in MODULES
        if name.startswith("vit_jax") and not is_part_of(name, ["vit_jax.data"])
    ]
    modules = [name for name in modules if not name.endswith(".__main__")]
    code = "import sys\n"
    for name in ("tensorflow", "tensorflow_datasets", "sklearn"):
        code += f"sys.modules['{name}'] = None\n"  # an import of it raises
    code += f"import {', '.join(modules)}\n"
    code += "from vit_jax import Classifier, checkpoint, models, optim, pretrained"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_start_without_slow_imports(script):
    """A mistake in a flag is reported before TensorFlow and Orbax are imported."""
    slow = ("tensorflow", "tensorflow_datasets", "orbax.checkpoint", "sklearn", "matplotlib")
    code = f"import sys, {script}\nassert not {{*sys.modules}} & {{*{slow}}}"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_the_package_includes_every_room():
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert packages["packages"]["find"]["include"] == ["vit_jax*"]
    files = {path for path in (ROOT / "vit_jax").rglob("*.*") if path.suffix not in (".py", ".pyc")}
    names = {path.relative_to(ROOT / "vit_jax").as_posix() for path in files}
    assert names == set(packages["package-data"]["vit_jax"])
    for folder in ROOT.glob("vit_jax/**/"):
        if list(folder.glob("*.py")):
            assert (folder / "__init__.py").exists(), folder


def test_a_preset_cannot_assign_to_an_unknown_field():
    config = common.get_config()
    with pytest.raises(AttributeError, match='Did you mean "weight_decay"'):
        config.optimizer.weight_decy = 0.3


def test_configurations_do_not_share_fields():
    common.quick(common.get_config())
    assert common.get_config().model.depth is None


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 150
