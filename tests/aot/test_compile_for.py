"""A run's report for a TPU slice. Tests marked `compiler` need libtpu."""

import json
import subprocess
import sys

import pytest
from conftest import TINY
from whole_runs import ONE_DEVICE, ROOT

from configs import common, vit_s16
from vit_jax.aot import compile_for, compile_report
from vit_jax.errors import DoesNotFit
from vit_jax.parallel.mesh import create_mesh
from vit_jax.training.program import Program


@pytest.fixture
def config():
    config = common.get_config()
    config.update(batch_size=64, image_size=32, num_classes=10)
    config.model.update(TINY | dict(width=256, mlp_dim=1024))
    return config


def test_remedies_split_the_state_then_accumulate_then_rematerialize(config):
    """For a run that needs twice the memory, first with a small state, then with a large one."""
    config.total_steps = compile_for.ANY_STEPS
    config.model.remat = "none"
    program = Program(config, (32, 32, 3), create_mesh(data=8))  # 8 examples per device
    for available in (10**12, 10**6):
        remedies = remedies_of(program, 2 * available, available)
        fsdp = {} if available == 10**12 else {"mesh.data": -1, "mesh.fsdp": 8}
        expected = [fsdp] if fsdp else []
        expected += [fsdp | {"accum_steps": factor} for factor in (2, 4, 8)]
        expected += [fsdp | {"model.remat": "full"}]
        expected += [fsdp | {"model.remat": "full", "accum_steps": 8}]
        if not fsdp:
            expected += [{"mesh.data": -1, "mesh.fsdp": 8, "model.remat": "full", "accum_steps": 8}]
        assert remedies == expected
    config.mesh.slices = 2  # FSDP stays inside a slice
    assert max(part.get("mesh.fsdp", 1) for part in remedies_of(program, 2, 1)) == 4
    program.remat = "full"  # what "auto" has come to
    assert not any("model.remat" in overrides for overrides in remedies_of(program, 2, 1))


def remedies_of(program, required, available):
    return list(compile_report.remedies(program, required, available))


@pytest.mark.compiler
def test_report_of_a_run_with_fsdp(config, tmp_path):
    """Parameters are gathered and gradients summed over the axis that splits them."""
    config.mesh.fsdp = 4
    report = compile_for.compile_and_report(config, (32, 32, 3), "v5e:2x2", tmp_path)
    assert json.loads((tmp_path / "compile_report.json").read_text()) == report
    assert report["fits"]
    assert report["devices"] == 4
    step = report["train_step"]
    sent = {}
    for collective in step["collectives"]:
        assert collective["axes"] in (["fsdp"], [])
        kind = sent.setdefault(collective["kind"], 0)
        sent[collective["kind"]] = kind + collective["bytes_sent"]
    # bfloat16 parameters are gathered in the forward pass, and kept or gathered again in the
    # backward pass; activations never are.
    matrices = 2 * (4 * 256 * 256 + 2 * 256 * 1024)
    assert 0.7 * 2 * matrices * 3 / 4 < sent["all-gather"] < 1.3 * 2 * 2 * matrices
    predicted = report["predicted"]
    assert step["total_bytes"] < report["available_bytes"]
    assert predicted["step_seconds"] > step["flops"] / 197e12
    assert predicted["images_per_second"] == pytest.approx(64 / predicted["step_seconds"])
    assert 0 < predicted["mfu"] < 1
    assert 0 <= predicted["communication_share"] < 1


@pytest.mark.compiler
def test_report_of_a_run_on_two_slices(config):
    """Parameters are gathered inside a slice; only sums of gradients are sent between slices."""
    config.mesh.fsdp = 2
    report = compile_for.compile_and_report(config, (32, 32, 3), "v5e:2x2x2")
    assert (report["devices"], report["slices"]) == (8, 2)
    collectives = report["train_step"]["collectives"]
    between = [part for part in collectives if part["between"]]
    assert {part["kind"] for part in collectives} >= {"all-gather", "all-reduce"}
    assert [(p["kind"], p["axes"], p["between"]) for p in between] == [
        ("all-reduce", ["data"], "slices")
    ]
    # Each of a slice's four chips sends a quarter of the gradients, in float32 at most.
    assert 0 < between[0]["bytes_sent"] < 1.1 * 4 * report["parameters"] / 4
    assert report["predicted"]["step_seconds"] > 0


@pytest.mark.compiler
def test_a_run_that_does_not_fit_is_told_a_remedy_that_does():
    config = vit_s16.get_config()
    config.num_classes = 1000
    config.model.update(scan=True, remat="none")
    message = r"doesn't fit v5e:2x2; it does with --config.accum_steps="
    with pytest.raises(DoesNotFit, match=message):
        compile_for.compile_and_report(config, (224, 224, 3), "v5e:2x2")


@pytest.mark.compiler
@pytest.mark.parametrize(("batch_size", "code"), [(256, 0), (250, 2)])
def test_exit_codes_of_the_command_line_without_a_dataset(batch_size, code):
    command = [sys.executable, "train.py", "--config=configs/vit_ti16.py", "--config.model.depth=2"]
    command += ["--compile_for=v5e:2x2", f"--config.batch_size={batch_size}"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=ONE_DEVICE,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert ("Fits         yes" in done.stdout) == (code == 0)
