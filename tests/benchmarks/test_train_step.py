"""The benchmark of the training step runs, and measures the same model everywhere."""

import os
import re
import subprocess
import sys

import jax
import pytest
from whole_runs import ROOT

from benchmarks import textbook_vit
from benchmarks.peers import NUM_CLASSES, PARTS, Settings, fields
from vit_jax import models


def test_the_textbook_model_has_our_parameters():
    settings = Settings("Ti/16", 32, 2, "float32")
    textbook = textbook_vit.ViT(NUM_CLASSES, **fields(settings), dtype=settings.dtype)
    ours = models.create(settings.model, num_classes=NUM_CLASSES)
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), "float32")

    def sizes(model):
        shapes = jax.eval_shape(model.init, jax.random.key(0), images)
        return sorted(leaf.size for leaf in jax.tree.leaves(shapes))

    assert sizes(textbook) == sizes(ours)


@pytest.mark.slow
def test_it_prints_a_row_for_each_implementation():
    arguments = ["--model=Ti/16", "--image_size=32", "--batch_size=2", "--peers=ours,flax"]
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.train_step", *arguments, "--steps=1", "--rounds=1"],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    rows = [line.split("|")[1:-1] for line in result.stdout.splitlines() if line.startswith("|")]
    cells = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}
    for name in ("ours", "flax"):
        assert all(cell.endswith(" ms") for cell in cells[name][: len(PARTS)])
        assert float(cells[name][len(PARTS)].replace(",", "")) > 0
    assert re.search(r"float32; [\d,]+ parameters", result.stdout)  # as many in both
