"""Curves of runs."""

import io
import json

import numpy as np
import pytest

from vit_jax.errors import UserError
from vit_jax.figures import curves


def write_rows(folder, *rows):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_runs_side_by_side(tmp_path):
    """A panel for each metric, a color for each run, a line for each group."""
    first = write_rows(
        tmp_path / "one",
        {"step": 1, "train/accuracy": 0.2, "train/loss": 3.0, "train/learning_rate": 0.1},
        {"step": 2, "train/accuracy": 0.4, "train/loss": 2.0, "train/learning_rate": 0.2},
        {"step": 2, "val/loss": 2.5},
    )
    with open(first / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "train/lo')  # being written
    second = write_rows(tmp_path / "two", {"step": 5, "train/loss": 1.0, "fewshot/10_shot": 0.3})
    figure = curves.curves([first, second])
    panels = [axis for axis in figure.axes if axis.axison]
    assert [axis.get_title() for axis in panels] == ["loss", "accuracy", "learning rate", "10 shot"]
    assert {axis.get_xlabel() for axis in panels} == {"step"}
    train, val, other = panels[0].get_lines()
    np.testing.assert_array_equal(train.get_xydata(), [[1, 3], [2, 2]])
    np.testing.assert_array_equal(val.get_xydata(), [[2, 2.5]])
    np.testing.assert_array_equal(other.get_xydata(), [[5, 1]])
    assert train.get_color() == val.get_color() != other.get_color()
    assert train.get_linestyle() == other.get_linestyle() != val.get_linestyle()
    legend = {text.get_text() for text in figure.legends[0].get_texts()}
    assert legend == {"one: train", "one: val", "two: train", "two: fewshot"}
    figure = curves.curves([first, second], metrics=["learning_rate", "loss"])
    assert [axis.get_title() for axis in figure.axes] == ["learning rate", "loss"]
    with pytest.raises(UserError, match="--metrics is 'lr'; it must be 'loss', 'accuracy'"):
        curves.curves([first], metrics=["lr"])


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    runs = [write_rows(tmp_path / str(i) / "run", {"step": 1, "train/loss": 1.0}) for i in range(2)]
    texts = [text.get_text() for text in curves.curves(runs).legends[0].get_texts()]
    assert texts == [f"{run}: train" for run in runs]


def test_names_are_drawn_as_they_are(tmp_path):
    """Matplotlib would hide a label that starts with "_", and read "$...$" as a formula."""
    run = write_rows(tmp_path / "_a$^{$", {"step": 1, "train/loss": 1.0})
    figure = curves.curves([run, write_rows(tmp_path / "b", {"step": 1, "train/loss": 1.0})])
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["_a$^{$: train", "b: train"]
    figure.savefig(io.BytesIO())


def test_many_runs_have_different_colors(tmp_path):
    runs = [write_rows(tmp_path / str(i), {"step": 1, "train/loss": 1.0}) for i in range(12)]
    lines = curves.curves(runs).axes[0].get_lines()
    assert len({tuple(line.get_color()) for line in lines}) == 12


def test_runs_without_metrics_are_refused(tmp_path):
    with pytest.raises(UserError, match="metrics.jsonl can't be read: No such file"):
        curves.curves([tmp_path])
    with pytest.raises(UserError, match="has no metrics yet"):
        curves.curves([write_rows(tmp_path / "empty")])
