"""The bound of a GPU program's time, and runs compiled for GPUs.

Tests marked `compiler` need XLA's compiler for GPUs: pip install "jax[cuda13]".
"""

import dataclasses
import importlib.util
import json
import math
import pathlib
import textwrap

import pytest
from conftest import TINY

from configs import common
from vit_jax import models
from vit_jax.aot import compile_for, compile_report, gpu, gpu_cost, hlo
from vit_jax.errors import DoesNotFit, UserError
from vit_jax.scaling import flops

PROGRAM = (pathlib.Path(__file__).parent / "h100_program.hlo").read_text()

has_compiler = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None, reason="jax[cuda13] isn't installed"
)


def bound(text, bandwidth=math.inf, **peaks):
    """Returns the cost for two GPUs that are infinitely fast, except for what is given."""
    speeds = dict.fromkeys(("bf16", "tf32", "f32"), math.inf) | peaks
    card = dataclasses.replace(gpu.CARDS["h100"], memory_bandwidth=bandwidth, flops=speeds)
    return gpu_cost.program_bound(hlo.Module(text), {"data": 2, "fsdp": 1, "tensor": 1}, card)


def test_operations_of_library_calls_at_the_peak_of_their_precision():
    """x @ w in bfloat16, attention (N 4, H 2, L 16, d 64), a float32 product; and gradients."""
    products = 2 * (2 * 64 * 128 * 128)  # and the gradient of w; x needs none
    attention = (2 + 5) * (2 * 4 * 2 * 16 * 16 * 64)
    exact = 3 * (2 * 4 * 128 * 10)
    assert bound(PROGRAM).flops == products + attention + exact
    assert bound(PROGRAM, bf16=1.0).seconds == products + attention
    assert bound(PROGRAM, f32=1.0).seconds == exact
    assert bound(PROGRAM, tf32=1.0).seconds == 0
    relaxed = PROGRAM.replace("HIGHEST", "DEFAULT")
    assert bound(relaxed, tf32=1.0).seconds == exact


def test_an_operation_takes_the_larger_of_its_two_times():
    """At 20 operations per byte, products take longer than their memory traffic; attention less."""
    both, only_memory = bound(PROGRAM, 1.0, bf16=20.0), bound(PROGRAM, 1.0)
    only_products = bound(PROGRAM, bf16=20.0)
    assert only_memory.seconds < both.seconds < only_memory.seconds + only_products.seconds


def test_memory_traffic_without_workspaces_and_collectives_sent():
    """The float32 head alone: 2 KiB of activations, 5 KiB of weights, 160 bytes of logits."""
    (call,) = [line for line in PROGRAM.splitlines() if "%custom-call.6 = " in line]
    entry = f"""
ENTRY %main (a: f32[4,128], b: f32[128,10]) -> f32[4,10] {{
  %bitcast.3.0 = f32[4,128]{{1,0}} parameter(0)
  %param.2 = f32[128,10]{{1,0}} parameter(1)
{call}
}}"""
    assert bound(entry).memory_bytes == 4 * (4 * 128 + 128 * 10 + 4 * 10)
    cost = bound(PROGRAM, bandwidth=1.0)
    sent = [2, 128 * 128 * 2 + 128 * 10 * 4]
    assert cost.collectives == {("all-reduce", ("data",), False): sent}
    mesh_shape = {"data": 2, "fsdp": 1, "tensor": 1}
    two_hosts = gpu_cost.program_bound(hlo.Module(PROGRAM), mesh_shape, gpu.CARDS["h100"], [0, 1])
    assert two_hosts.collectives == {("all-reduce", ("data",), True): sent}
    # They read and write memory too, but may do so while other operations run.
    assert cost.memory_bytes - cost.seconds == 2 * (128 * 128 * 2 + 128 * 10 * 4)


@pytest.mark.parametrize(
    ("function", "left", "right", "result"),
    [
        ("convForward", "2,8,8,3", "3,3,3,4", "2,8,8,4"),
        ("convBackwardInput", "2,8,8,4", "3,3,3,4", "2,8,8,3"),
        ("convBackwardFilter", "2,8,8,3", "2,8,8,4", "3,3,3,4"),
    ],
)
def test_a_convolution_and_its_gradients_take_as_many_operations(function, left, right, result):
    """Elements of the window that fall on padding don't count: 22 = 8 + 2 * 7 along each axis."""
    text = textwrap.dedent(f"""\
        ENTRY %main (a: x, b: x) -> x {{
          %a = bf16[{left}]{{3,2,1,0}} parameter(0)
          %b = bf16[{right}]{{3,2,1,0}} parameter(1)
          ROOT %c = (bf16[{result}]{{3,2,1,0}}, u8[0]{{0}}) custom-call(%a, %b), window={{size=3x3 pad=1_1x1_1}}, dim_labels=b01f_01io->b01f, custom_call_target="__cudnn${function}"
        }}
    """)  # noqa: E501
    assert bound(text).flops == 2 * 2 * 22 * 22 * 3 * 4


def test_an_unknown_library_call_is_not_free():
    with pytest.raises(UserError, match=r"operations of __cublas\$new in .* aren't known"):
        bound(PROGRAM.replace("lt$matmul", "new"))


@pytest.fixture
def config():
    config = common.get_config()
    config.update(batch_size=64, image_size=32, num_classes=10)
    config.model.update(TINY | dict(width=128, mlp_dim=512))
    return config


@pytest.mark.compiler
@has_compiler
def test_report_of_a_run_on_gpus(config, tmp_path):
    report = compile_for.compile_and_report(config, (32, 32, 3), "h100:2", tmp_path)
    assert json.loads((tmp_path / "compile_report.json").read_text()) == report
    assert (report["fits"], report["devices"], report["attention"]) == (True, 2, "cudnn")
    assert report["environment"] == {}
    step = report["train_step"]
    assert step["total_bytes"] < report["available_bytes"] < gpu.CARDS["h100"].memory_bytes
    assert {(c["kind"], *c["axes"]) for c in step["collectives"]} == {("all-reduce", "data")}
    # Gradients of all parameters, in bfloat16 and float32: twice half of them are sent.
    sent = sum(collective["bytes_sent"] for collective in step["collectives"])
    assert 2 * report["parameters"] < sent < 4 * report["parameters"]
    model_flops = 3 * 32 * flops.forward_flops(models.from_config(config), (32, 32, 3))
    assert step["flops"] == pytest.approx(model_flops, rel=0.1)
    assert report["bound"]["step_seconds"] > step["flops"] / gpu.CARDS["h100"].flops["bf16"]
    assert report["predicted"] is None
    assert any("Bound  " in line for line in compile_report.report_lines(report))


@pytest.mark.compiler
@has_compiler
def test_gpus_that_are_too_small_and_the_remedy(config, monkeypatch):
    config.batch_size = 1024
    monkeypatch.setattr(gpu.Gpus, "memory_bytes", 100 * 2**20)
    with pytest.raises(DoesNotFit, match="doesn't fit l4:1; it does with --config.accum_steps="):
        compile_for.compile_and_report(config, (32, 32, 3), "l4:1")
