"""The command that fits laws to a study."""

import json
import pathlib

import numpy as np
import pytest
from PIL import Image
from test_tables import write_run

from vit_jax.scaling import command, fit, tables
from vit_jax.scaling.laws import PowerLaw, frontier

PUBLISHED = pathlib.Path(__file__).parents[2] / "benchmarks" / "published" / "scaling_vit_3b.csv"
LAW = PowerLaw(a=0.63, b=0.32, c=0.12, d=0.52)


def run(*arguments) -> int:
    return command.main(["fit", *map(str, arguments)])


def pictures(out) -> set[str]:
    """The names of the figures in a folder, each a PNG with something in it, and a PDF."""
    for path in out.glob("*.png"):
        assert np.asarray(Image.open(path).convert("L")).std() > 5
        assert path.with_suffix(".pdf").read_bytes().startswith(b"%PDF")
    return {path.stem for path in out.glob("*.png")}


@pytest.fixture
def curve(tmp_path):
    """A table made elsewhere: a curve of known constants with noise of 2%."""
    rng, compute = np.random.default_rng(0), np.geomspace(0.1, 1e5, 60)
    errors = LAW(compute) * np.exp(0.02 * rng.standard_normal(60))
    rows = [f"{c},{e},note {i}" for i, (c, e) in enumerate(zip(compute, errors, strict=True))]
    (tmp_path / "curve.csv").write_text("\n".join(["core_days,loss,note", *rows]) + "\n")
    return tmp_path / "curve.csv"


@pytest.mark.slow
def test_published_results(tmp_path, capsys):
    assert run(PUBLISHED, f"--out={tmp_path}", "--budget=1e22", "--resamples=60") == 0
    assert "95% intervals: a " in capsys.readouterr().out
    found = json.loads((tmp_path / "fit.json").read_text())
    rows = tables.add_costs(tables.read_csv(PUBLISHED))
    for metric, exponents in (
        ("fewshot10_accuracy", (0.22, 0.28)),
        ("finetune_accuracy", (0.24, 0.30)),
    ):
        of_metric = found["metrics"][metric]
        points = tables.points(rows, metric, "exaflops", "model", "gflops")
        lowest = frontier(points.compute, points.error)
        law = PowerLaw(*(of_metric[name] for name in "abcd"))
        assert law(points.compute[lowest]) == pytest.approx(points.error[lowest], abs=0.025)
        assert exponents[0] < law.b < exponents[1]
        low, high = of_metric["intervals"]["b"]
        assert low < law.b < high
        assert of_metric["models"].keys() >= {"Ti/16", "S/32", "S/16", "B/32", "B/16", "L/16"}
        assert of_metric["notes"] == [
            "no law of G/14: too few points for a law of 4 constants: 1; it needs 5"
        ]
    assert found["b"] == found["metrics"]["fewshot10_accuracy"]["b"]
    budget = found["budget"]
    assert (budget["compute"], budget["model"]) == (1e4, "g/14")
    images = 1e22 / (3e9 * tables.forward_gflops("g/14", 224))
    assert budget["images"] == pytest.approx(images, rel=1e-6)
    best = budget["shapes"]["gflops"]
    assert best["images"] == pytest.approx(1e22 / (3e9 * best["value"]), rel=1e-3)
    assert pictures(tmp_path) == {"compute", "images", "size", "overview", "shape-gflops"}


def test_a_table_made_elsewhere(curve, tmp_path, capsys):
    out = tmp_path / "new" / "out"
    flags = "--compute=core_days", "--error=loss", "--budget=1e6"
    for _ in range(2):  # the second time overwrites the first
        assert run(curve, f"--out={out}", *flags) == 0
    found = json.loads((out / "fit.json").read_text())
    assert found["b"] == pytest.approx(LAW.b, rel=0.05)
    for name, value in LAW._asdict().items():
        low, high = found["intervals"][name]
        assert low <= value <= high
    assert found["notes"] == []  # of what the table doesn't have
    assert found["frontier"]["points"] >= 58  # noise drops none of a single curve
    assert found["budget"]["error"] == pytest.approx(float(LAW(1e6)), rel=0.05)
    assert found["budget"]["is_extrapolated"]
    assert pictures(out) == {"compute"}
    assert "beyond all points" in capsys.readouterr().out


@pytest.mark.slow
def test_a_folder_of_runs(tmp_path, tiny_config, capsys):
    for width in (16, 32, 64, 128):
        for steps in (10, 40, 160):
            tiny_config.model.width, tiny_config.total_steps = width, steps
            error = 0.5 * width**-0.6 + (0.004 * width**0.5 + 0.5) * steps**-0.4 + 0.05
            rows = [{"step": steps, "val/accuracy": 1 - error, "val/loss": 2 * error}]
            write_run(tmp_path / "study" / f"{width}-{steps}", tiny_config, rows)
    assert (
        run(tmp_path / "study", "--model=model.width", "--shape=model.width", "--resamples=40") == 0
    )
    out = tmp_path / "study" / "fit"
    assert len(tables.read_csv(out / "table.csv")) == 12
    found = json.loads((out / "fit.json").read_text())
    assert found["error"] == "val/accuracy"
    assert found["joint"].keys() == {"model.width"}
    assert found["notes"][0].startswith("no law of 16: too few points")
    assert pictures(out) >= {"compute", "images", "size", "overview", "shape-model.width"}
    # A law that can't be fitted loses nothing: the table has been written.
    (out / "table.csv").unlink()
    assert run(tmp_path / "study" / "16-10") == 2
    assert "too few points for a law of 4 constants: 1" in capsys.readouterr().err
    assert len(tables.read_csv(tmp_path / "study" / "16-10" / "fit" / "table.csv")) == 1


def test_the_star_of_a_sweep_leaves_the_center_in_one_column():
    rows = [{"w": w, "d": d} for w, d in ((1, 1), (2, 1), (3, 1), (1, 1), (1, 2), (1, 3))]
    assert fit.around_center(rows, "w", ("w", "d")) == [rows[i] for i in (0, 1, 2, 3)]
    assert fit.around_center(rows, "d", ("w", "d")) == [rows[i] for i in (0, 3, 4, 5)]


def test_mistakes_end_with_one_line(curve, tmp_path, capsys):
    loss = (curve, "--compute=core_days", "--error=loss")
    few = tmp_path / "few.csv"
    few.write_text("\n".join(curve.read_text().splitlines()[:4]) + "\n")
    for arguments, message in (
        ((tmp_path / "no.csv",), "no.csv can't be read: No such file or directory"),
        ((tmp_path,), "has no runs with an evaluation"),
        ((curve,), "has no column 'exaflops', nor what it follows from"),
        ((curve, "--compute=core_days"), "no column whose name ends in 'error' or 'accuracy'"),
        ((curve, "--compute=flops", "--error=loss"), "no column 'flops'; it has core_days, loss"),
        ((*loss, "--model=size"), "no column 'size'; it has core_days, loss, note"),
        ((*loss, "--shape=width"), "no column 'width'"),
        ((curve, "--compute=core_days", "--error=note"), "'note 0' in the column 'note'"),
        ((*loss, "--resamples=1"), "--resamples is 1; it must be a whole number >= 20"),
        ((*loss, "--budget=0"), "--budget is 0.0; it must be a number > 0"),
        ((few, *loss[1:]), "loss: too few points for a law of 4 constants: 3; it needs 5"),
    ):
        assert run(*arguments, f"--out={tmp_path / 'out'}") == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / "compute.pdf").write_text("mine")
    assert run(*loss, f"--out={tmp_path / 'out'}") == 2
    assert "a file that this program didn't write" in capsys.readouterr().err
    assert (tmp_path / "out" / "compute.pdf").read_text() == "mine"
