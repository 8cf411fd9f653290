"""Tables of results: of runs, and of CSV files."""

import json
import math

import jax
import numpy as np
import pytest

from vit_jax import models
from vit_jax.errors import UserError
from vit_jax.runs import run_folder
from vit_jax.scaling import flops, tables

LOG = "2026-01-01 00:00:00 INFO Devices      4 x cpu, mesh data 4, fsdp 1, tensor 1\n"


def write_run(workdir, config, rows, log=LOG):
    """Writes what a run leaves of itself that a table is made from."""
    workdir.mkdir(parents=True)
    run_folder.write_config(workdir, config)
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (workdir / "train.log").write_text(log)


@pytest.fixture
def study(tmp_path, tiny_config):
    """Two runs of two widths, one of which has ended, and one without an evaluation."""
    for width, steps in ((16, 24), (32, 12)):
        tiny_config.model.width = width
        rows = [
            {"step": 12, "train/loss": 1.0, "train/images_per_second": 96.0},
            {"step": 12, "val/loss": 0.9, "val/accuracy": 0.5},
            {"step": 12, "knn/accuracy": 0.4},
            {"step": 24, "train/loss": 0.8, "train/images_per_second": 48.0},
            {"step": 24, "val/loss": 0.7, "val/accuracy": 0.6},
        ]
        rows = [row for row in rows if row["step"] <= steps]
        write_run(tmp_path / "study" / f"width={width}", tiny_config, rows)
    tiny_config.optimizer.weight_decay = 0.3
    write_run(tmp_path / "study" / "more" / "new", tiny_config, [])
    return tmp_path / "study"


def test_gathering_runs(study, tiny_config, caplog):
    rows = tables.gather(study)
    assert [(row["cell"], row["step"], row["final"]) for row in rows] == [
        ("width=16", 12, 0),
        ("width=16", 24, 1),
        ("width=32", 12, 0),
    ]
    assert "Not in the table, without an evaluation yet: more/new" in caplog.text
    row = rows[1]
    tiny_config.model.width = 16
    model = models.from_config(tiny_config)
    forward = flops.forward_flops(model, (32, 32, 3))
    assert row["gflops"] == forward / 1e9
    assert row["images_seen"] == 24 * 8
    assert row["exaflops"] == pytest.approx(3 * forward * 24 * 8 / 1e18)
    # 12 steps of 8 images at 96 images/s, then at 48, on 4 devices
    assert row["device_hours"] == pytest.approx(4 * 3 / 3600)
    assert row["model.width"] == 16
    assert row["val/accuracy"] == 0.6
    assert (rows[0]["knn/accuracy"], row["knn/accuracy"]) == (0.4, None)
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
    params = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), images)
    assert row["params"] == flops.num_params(params)
    assert "model.depth" not in row  # doesn't differ
    assert "train/loss" not in row


def test_a_table_survives_a_csv_file(study, tmp_path):
    rows = tables.gather(study)
    (tmp_path / "table.csv").write_text(tables.to_csv(rows))
    assert tables.read_csv(tmp_path / "table.csv") == rows


def test_only_finished_runs_are_points(study):
    points = tables.points(tables.gather(study), "val/accuracy", "exaflops", "variant", "params")
    assert points.error == pytest.approx([0.4])
    assert points.images == [192]
    with pytest.raises(UserError, match="No run has knn/accuracy at its last step"):
        tables.points(tables.gather(study), "knn/accuracy", "exaflops", None, "params")


def test_a_folder_without_runs(tmp_path):
    with pytest.raises(UserError, match="has no runs with an evaluation, of 0 runs"):
        tables.gather(tmp_path)


def test_costs_follow_from_the_variant_and_the_steps(tmp_path):
    (tmp_path / "a.csv").write_text(
        "model,steps,batch_size,val_accuracy\nB/16,1000,4096,75\nL/16,500,4096,\nL/16,500,4096,80\n"
    )
    rows = tables.add_costs(tables.read_csv(tmp_path / "a.csv"))
    points = tables.points(rows, "val_accuracy", "exaflops", "model", "gflops")
    assert points.names() == ["B/16", "L/16"]
    assert points.error == pytest.approx([0.25, 0.2])
    assert points.images == pytest.approx([4.096e6, 2.048e6])
    assert points.size == pytest.approx([35.1, 122.9], rel=0.03)  # Table 2 of arXiv:2106.04560
    assert points.compute == pytest.approx(3e-9 * points.size * points.images)


def test_a_perfect_run_is_left_out_with_a_warning(caplog):
    rows = [{"c": 1.0, "e": 0.5}, {"c": 2.0, "e": 0.0}]
    assert tables.points(rows, "e", "c", None, "size").error.tolist() == [0.5]
    assert "e: 1 of 2 rows have an error of 0 or less" in caplog.text
    assert math.isnan(tables.points(rows, "e", "c", None, "size").size[0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "isn't a CSV file: it is empty"),
        ("c,e\n", "has no rows, only a header"),
        ("c,c\n1,2\n", "two columns of one name"),
        ("c,e\n1,2\n3\n", "row 2 has 1 cells; its header has 2"),
        ("c,x\n1,2\n", "no column 'e'; it has c, x"),
        ("c,e\n1,2\n3,high\n", "Row 2 has 'high' in the column 'e', not a number"),
        ("c,e\n1,2\ninf,2\n", "Row 2 has inf in the column 'c', not a number"),
        ("c,e\n1,0.2\n0,0.3\n", "Row 2 has 0 in the column 'c'; compute must be above 0"),
        ("c,e\n1,\n,2\n", "No row of the table has both e and c"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path, text, message):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        tables.points(tables.read_csv(tmp_path / "a.csv"), "e", "c", None, "size")
