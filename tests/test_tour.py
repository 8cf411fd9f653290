"""docs/tour.ipynb runs from start to end."""

import pathlib
import shutil

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

ROOT = pathlib.Path(__file__).resolve().parents[1]
CODE = ("vit_jax", "configs", "command_line", "docs")


def read():
    return nbformat.read(ROOT / "docs" / "tour.ipynb", 4)


def outputs(notebook, kind: str) -> int:
    """The number of outputs of a MIME type."""
    return sum(
        kind in output.get("data", {})
        for cell in notebook.cells
        for output in cell.get("outputs", ())
    )


def test_it_is_stored_with_its_outputs():
    notebook = read()
    assert outputs(notebook, "image/png") == 4
    kinds = {o.output_type for cell in notebook.cells for o in cell.get("outputs", ())}
    assert "error" not in kinds


@pytest.mark.slow
def test_it_runs(tmp_path, monkeypatch):
    """In a copy of the code, as in docs/ of a clone."""
    for name in CODE:
        shutil.copytree(ROOT / name, tmp_path / name)
    for script in ROOT.glob("*.py"):
        shutil.copy(script, tmp_path)
    monkeypatch.setenv("XLA_FLAGS", "")  # one device
    notebook = read()
    client = nbclient.NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path / "docs")}},
    )
    client.execute()  # raises if a cell does
    assert outputs(notebook, "image/png") == 4
    assert (tmp_path / "runs" / "tour_shapes" / "checkpoints").is_dir()
