"""Files that submit a study's cells to a cluster."""

import subprocess

import pytest
from pages_of_tests import load, write_page

from vit_jax.errors import UserError
from vit_jax.scaling import command
from vit_jax.studies import costs, pages

STAGES = {
    "pretrain": {"axes": {"model.depth": (1, 2), "dataset.train_split": ("train[:90%]",)}},
    "transfer": {"after": "pretrain", "set": {"init_from": "{parent}"}},
}

# Stands in for sbatch: prints a number for each array, and notes how it was called.
SBATCH = """#!/usr/bin/env bash
echo "$@" >>"$CALLS"
wc -l <"$CALLS"
"""
# Stands in for launch/slurm.sh: notes the arguments that a task gets.
LAUNCH = """for argument in "$@"; do echo "$argument"; done >"$CALLS"
"""


def run_command(page, root, *flags) -> int:
    return command.main(["run", page, f"--root={root}", *flags])


def test_slurm_arrays(tmp_path):
    root = tmp_path / "a study"
    page = write_page(tmp_path, {"stages": STAGES})
    assert run_command(page, root, "--slurm", "--workers=4") == 0
    script = (root / "slurm" / "pretrain.sh").read_text()
    assert "#SBATCH --array=1-2%4\n" in script
    assert "#SBATCH --requeue\n" in script  # from launch/slurm.sh

    (tmp_path / "sbatch").write_text(SBATCH)
    (tmp_path / "sbatch").chmod(0o755)
    calls = tmp_path / "calls"
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "CALLS": str(calls)}
    subprocess.run(["bash", root / "slurm" / "submit.sh"], env=environment, check=True)
    assert calls.read_text().splitlines() == [
        f"--parsable {root}/slurm/pretrain.sh",
        f"--parsable --dependency=afterok:1 {root}/slurm/transfer.sh",
    ]

    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "slurm.sh").write_text(LAUNCH)
    environment["SLURM_ARRAY_TASK_ID"] = "2"
    subprocess.run(
        ["bash", root / "slurm" / "pretrain.sh"], env=environment, cwd=tmp_path, check=True
    )
    cell = "depth=2_train_split=train-90"
    assert calls.read_text().splitlines() == [
        "train.py",
        f"--config={page}",
        "--config.model.depth=2",
        "--config.dataset.train_split=train[:90%]",
        f"--workdir={root}/pretrain/{cell}",
    ]


LOOKUP = """#!/usr/bin/env bash
[[ $* == *--command_of=final/run ]] || exit 9
%s
"""


@pytest.mark.parametrize(
    ("found", "code"),
    [("echo python train.py --config=found.py", 0), ("echo Why >&2; exit 2", 2), ("", 2)],
)
def test_a_lookup_that_fails_fails_the_job(tmp_path, capsys, found, code):
    """A job whose command isn't found out, by an error or for nothing printed, doesn't succeed."""
    stages = {"sweep": {"axes": {"lr": (0.1, 0.2)}}, "final": {"best": "sweep", "over": ("lr",)}}
    page, root = write_page(tmp_path, {"stages": stages}), tmp_path / "a study"
    assert run_command(page, root, "--slurm") == 0
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "slurm.sh").write_text(LAUNCH)
    python = tmp_path / "python"
    python.write_text(LOOKUP % found)
    python.chmod(0o755)
    calls = tmp_path / "calls"
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "CALLS": str(calls), "PYTHON": "python"}
    environment["SLURM_ARRAY_TASK_ID"] = "1"
    script = ["bash", root / "slurm" / "final.sh"]
    assert subprocess.run(script, env=environment, cwd=tmp_path, check=False).returncode == code
    assert calls.exists() == (code == 0)
    if code == 0:
        assert calls.read_text().splitlines() == ["train.py", "--config=found.py"]

    capsys.readouterr()
    assert run_command(page, root, "--print", "--cells=final/*") == 0
    *_, line = capsys.readouterr().out.splitlines()
    python.write_text((LOOKUP % found).replace("[[", "[[ $1 == train.py ]] && exit 0\n[[", 1))
    shell = subprocess.run(["sh", "-c", line], env=environment, cwd=tmp_path, check=False)
    assert (shell.returncode == 0) == (code == 0)


def test_the_command_of_a_cell(tmp_path, capsys):
    stages = {"sweep": {"axes": {"lr": (0.1, 0.2)}}, "final": {"best": "sweep", "over": ("lr",)}}
    page, root = write_page(tmp_path, {"stages": stages}), tmp_path / "study"
    assert run_command(page, root, "--command_of=sweep/lr=0.1") == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("python train.py ")
    assert line.endswith("/sweep/lr=0.1")
    for name, message in {
        "final/run": "'final/run', which needs sweep/lr=0.1, and 2 of the cells",
        "sweep/lr=0.3": "'sweep/lr=0.3', which is no cell: did you mean 'sweep/lr=0.",
    }.items():
        assert run_command(page, root, f"--command_of={name}") == 2
        out, err = capsys.readouterr()
        assert not out
        assert message in err
        assert err.count("\n") == 1


def test_xpk_workloads(tmp_path):
    root = tmp_path / "study"
    page = write_page(tmp_path, {"stages": STAGES})
    assert run_command(page, root, "--xpk") == 0
    (tmp_path / "xpk").write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@" >>"$CALLS"\n')
    (tmp_path / "xpk").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "CALLS": str(tmp_path / "calls")}
    script = root / "xpk" / "transfer.sh"
    assert subprocess.run(["bash", script], env=environment, check=False).returncode != 0
    environment |= {"CLUSTER": "mine", "TPU_TYPE": "v5litepod-16", "IMAGE": "image"}
    subprocess.run(["bash", script], env=environment, check=True)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[:6] == [
        *("workload", "create", "--cluster=mine", "--tpu-type=v5litepod-16"),
        *("--docker-image=image", "--workload=transfer-1"),
    ]
    parent = f"{root}/pretrain/depth=1_train_split=train-90"
    assert f"--config.init_from={parent} --workdir=" in calls[6]
    assert "--workload=transfer-2" in calls


def test_dry_run(tmp_path, capsys):
    """A branch counts from where it begins, and the last line is the sum."""
    study = {
        "config": "configs/scaling/scaling_vit.py:model=B/16",
        "cells": [
            {"images": 2.048e9},
            {"images": 2.048e9, "init_mode": "continue"} | {"init_from": "run/checkpoints/400000"},
            {"total_steps": 10},
        ],
    }
    assert run_command(write_page(tmp_path, study), tmp_path / "study", "--dry_run") == 0
    heads, *lines = capsys.readouterr().out.splitlines()
    assert heads.split() == ["cell", "variant", "parameters", "GFLOPs", "images", "exaFLOPs"]
    rows = [line.replace(",", "").split() for line in lines[:4]]
    images = [2.048e9, 2.048e9 - 400_000 * 4096, 10 * 4096]
    assert [float(row[-2]) for row in rows] == pytest.approx([*images, sum(images)], rel=1e-3)
    gflops = float(rows[0][-3])
    assert gflops == pytest.approx(35.4, rel=0.01)  # and attention pooling
    expected = [3e-9 * gflops * number for number in (*images, sum(images))]
    assert [float(row[-1]) for row in rows] == pytest.approx(expected, rel=1e-3)
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize(
    ("fields", "classes", "steps"),
    [
        ({"dataset.name": "digits"}, 10, round(2 * 1442 / 64)),
        ({"dataset.name": "cifar100", "dataset.examples": 0.5}, 100, round(2 * 25_000 / 64)),
        ({"dataset.name": "oxford_iiit_pet", "dataset.examples": 640}, 37, 20),
        # A share of a part isn't a share of the whole.
        ({"dataset.train_split": "train[:10%]", "dataset.examples": 0.5}, 10, None),
        ({"dataset.train_split": "train[:10%]", "dataset.examples": 64}, 10, 2),
        ({"dataset.name": "a/folder"}, None, None),
        ({"dataset.name": "a/folder", "num_classes": 7}, 7, None),
    ],
)
def test_a_cell_counts_with_its_dataset(tmp_path, fields, classes, steps):
    study = load(tmp_path, {"set": {"num_epochs": 2, "batch_size": 64, **fields}})
    counted = []

    def count(model, shape):
        counted.append(model.num_classes)
        return 1, 1

    found = costs.cost(study.cells[0], tmp_path, count)
    assert counted == [classes or 1000]
    assert found["assumed"] == (None if classes else "a/folder")
    assert found["steps"] == steps


def test_what_a_dry_run_assumes(tmp_path, capsys):
    stages = {
        "sweep": {"axes": {"lr": (0.1, 0.2)}, "set": {"dataset.name": "a/folder"}},
        "final": {"best": "sweep", "over": ("lr",)},
    }
    page = write_page(tmp_path, {"stages": stages})
    assert run_command(page, tmp_path / "study", "--dry_run") == 0
    *_, classes, values = capsys.readouterr().out.splitlines()
    assert classes == "Classes of a/folder aren't known: counted with 1,000."
    assert values.startswith("Values that a search draws, or the best cell decides, are counted")


# Stands in for train.py: a model wider than 100 doesn't fit, and one of depth 9 is a mistake.
COMPILE = """
import json, pathlib, sys
flags = dict(argument.lstrip("-").split("=", 1) for argument in sys.argv[1:])
with open(pathlib.Path(__file__).with_name("calls"), "a") as file:
    file.write(flags.get("config.num_classes", "") + "\\n")
if flags.get("config.model.depth") == "9":
    sys.exit("depth is 9")
width = int(flags.get("config.model.width", 64))
report = {"fits": width <= 100, "predicted": {"step_seconds": width / 10}}
pathlib.Path(flags["workdir"], "compile_report.json").write_text(json.dumps(report))
sys.exit(0 if report["fits"] else 3)
"""


def test_each_program_is_compiled_once(tmp_path, monkeypatch):
    """A report is used again by cells with the same step, until the code changes."""
    code = tmp_path / "code"
    (code / "vit_jax").mkdir(parents=True)
    (code / "train.py").write_text(COMPILE)

    def seconds(fields, machine="v5e:1x1"):
        study = load(tmp_path, {"set": fields})
        with monkeypatch.context() as patch:
            patch.setattr(pages, "repository", lambda: code)
            found = costs.step_seconds(study.cells[0], tmp_path / "study", machine)
        return found, len((code / "calls").read_text().splitlines())

    assert seconds({"model.width": 32}) == (3.2, 1)
    assert (code / "calls").read_text() == "10\n"  # of digits, which needn't be prepared
    assert seconds({"model.width": 32, "lr": 0.1, "total_steps": 9, "examples": 0.1}) == (3.2, 1)
    assert seconds({"model.width": 32, "dataset.channels": 3}) == (3.2, 2)
    assert seconds({"model.width": 32, "dataset.name": "cifar100"}) == (3.2, 3)
    assert seconds({"model.width": 32}, "v5e:2x2") == (3.2, 4)
    for _ in range(2):
        assert seconds({"model.width": 128}) == (None, 5)  # doesn't fit
    with pytest.raises(UserError, match="run can't be compiled for v5e:1x1: depth is 9"):
        seconds({"model.depth": 9})
    (code / "vit_jax" / "new.py").write_text("")
    costs.digest_of_code.cache_clear()
    assert seconds({"model.width": 32}) == (3.2, 7)
