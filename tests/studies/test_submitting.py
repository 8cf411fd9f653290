"""Files that submit a study's cells to a cluster."""

import subprocess

import pytest
from pages_of_tests import write_page

from vit_jax.scaling import command

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
