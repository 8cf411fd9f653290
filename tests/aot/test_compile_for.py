"""A run's report for a TPU slice. What needs the TPU's compiler is marked."""

import importlib.util
import json
import subprocess
import sys

import pytest
from conftest import TINY
from whole_runs import ONE_DEVICE, ROOT

from configs import common, vit_s16
from vit_jax.aot import compile_for, topology
from vit_jax.errors import DoesNotFit, UserError

compiler = pytest.mark.compiler


@pytest.fixture
def config():
    config = common.get_config()
    config.update(batch_size=64, image_size=32, num_classes=10)
    config.model.update(TINY | dict(width=256, mlp_dim=1024))
    return config


def test_no_such_slice():
    for name, why in (
        ("v5e:3", "v5e has 2 dimensions"),
        ("v5e:0x4", "it can be KIND:SIDES such as v5e:4x4"),
        ("v9:2x2", "with a kind of v4, v5e, v5p, v6e"),
        ("v5e", "it can be KIND:SIDES such as v5e:4x4"),
    ):
        with pytest.raises(UserError, match=f"--compile_for={name}: .*{why}"):
            topology.Slice(name)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is here")
def test_no_compiler():
    with pytest.raises(UserError, match=r"needs the TPU's compiler: pip install 'jax\[tpu\]=="):
        topology.Slice("v5e:2x2")


def test_links():
    """A side of a v5e closes to a ring at 16 chips; groups that alternate share its links."""
    v5e = topology.CHIPS["v5e"]
    for sides, at, expected in (
        ((4, 4), [(0, 0), (1, 0), (2, 0), (3, 0)], 1),
        ((16, 16), [(0, i) for i in range(16)], 2),
        ((16, 16), [(0, i) for i in range(0, 16, 4)], 2 / 4),
        ((16, 16), [(i, j) for i in range(16) for j in range(16)], 4),
        ((4, 4), [(0, 0), (1, 0), (0, 1), (1, 1)], 2),
    ):
        assert topology.bandwidth(v5e, sides, at) == expected * v5e.link_bytes
    v4, column = topology.CHIPS["v4"], [(0, 0, i) for i in range(4)]
    assert topology.bandwidth(v4, (2, 2, 4), column) == v4.link_bytes  # no torus: not all are fours
    assert topology.bandwidth(v4, (4, 4, 4), column) == 2 * v4.link_bytes


@compiler
@pytest.mark.parametrize(
    ("name", "devices"),
    [
        ("v5e:2x2", 4),
        ("v5e:32x32", 1024),
        ("v6e:16x16", 256),
        ("v4:2x2x1", 4),
        ("v5p:8x8x16", 1024),
    ],
)
def test_slices(name, devices):
    assert len(topology.Slice(name).devices) == devices


@compiler
def test_report(config, tmp_path):
    """Parameters are gathered and gradients summed, over the axis that splits them."""
    config.mesh.fsdp = 4
    report = compile_for.check(config, "v5e:2x2", tmp_path)
    assert json.loads((tmp_path / "compile_report.json").read_text()) == report
    assert report["fits"]
    assert report["devices"] == 4
    step = report["train_step"]
    sent = {}
    for collective in step["collectives"]:
        assert collective["axes"] in (["fsdp"], [])
        kind = sent.setdefault(collective["kind"], 0)
        sent[collective["kind"]] = kind + collective["bytes_sent"]
    # bfloat16 parameters once forward and once backward, or kept; never an activation.
    matrices = 2 * (4 * 256 * 256 + 2 * 256 * 1024)
    assert 0.7 * 2 * matrices * 3 / 4 < sent["all-gather"] < 1.3 * 2 * 2 * matrices
    predicted = report["predicted"]
    assert step["total_bytes"] < report["available_bytes"]
    assert predicted["step_seconds"] > step["flops"] / 197e12
    assert predicted["images_per_second"] == pytest.approx(64 / predicted["step_seconds"])
    assert 0 < predicted["mfu"] < 1
    assert 0 <= predicted["communication_share"] < 1


@compiler
def test_what_does_not_fit_is_told_what_helps():
    config = vit_s16.get_config()
    config.num_classes, config.model.scan = 1000, True
    with pytest.raises(
        DoesNotFit, match=r"doesn't fit v5e:2x2. It does with --config.accum_steps="
    ):
        compile_for.check(config, "v5e:2x2")


@compiler
def test_exit_codes(tmp_path):
    """From the command line, without the dataset."""
    command = [sys.executable, "train.py", "--config=configs/vit_ti16.py", "--config.model.depth=2"]
    command += ["--compile_for=v5e:2x2"]
    for batch_size, code in ((256, 0), (250, 2)):
        done = subprocess.run(
            [*command, f"--config.batch_size={batch_size}"],
            cwd=ROOT,
            env=ONE_DEVICE,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
    assert "Fits         yes" not in done.stdout
