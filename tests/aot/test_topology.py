"""Descriptions of TPU slices and GPUs. Tests marked `compiler` need libtpu."""

import importlib.util
import types

import jax
import pytest

from vit_jax.aot import topology
from vit_jax.errors import UserError
from vit_jax.parallel.mesh import create_mesh


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e:3", "a slice of v5e must have 2 sides, such as v5e:4x4, or v5e:4x4x2 for two slices"),
        ("v4:4x4", "a slice of v4 must have 3 sides, such as v4:4x4x4, or v4:4x4x4x2 for two"),
        ("v5e:0x4", "must be a TPU slice, KIND:SIDES .* such as v5e:4x4"),
        ("v9:2x2", "must be a TPU slice, KIND:SIDES with a kind of v4, v5e, v5p, v6e"),
        ("v5e", "must be a TPU slice, KIND:SIDES .* such as v5e:4x4"),
        ("h900:8", "with a card of h100, h200, b200, a100-80, a100-40, l4, rtx4090"),
        ("h100:9", "up to 8 on a host"),
        ("h100:4x4", "h100:4x8 for four hosts of eight"),
        ("h100", "or GPUs, CARD:NUMBER"),
    ],
)
def test_malformed_names_are_refused(name, message):
    with pytest.raises(UserError, match=f"--compile_for is '{name}'; .*{message}"):
        topology.create(name)


def test_names_of_gpus():
    for card in topology.CARDS:
        assert topology.parse_name(f"{card}:8") == (topology.CARDS[card], (8,))
    assert topology.parse_name("h100:4x8") == (topology.CARDS["h100"], (4, 8))


@pytest.mark.parametrize(
    ("kind", "bfloat16", "float32"),
    [
        ("TPU v5 lite", 197e12, None),
        ("TPU v5", 459e12, None),
        ("NVIDIA H100 80GB HBM3", 989.4e12, 66.9e12),
        ("NVIDIA H100 PCIe", None, None),
    ],
)
def test_peaks_of_devices(kind, bfloat16, float32):
    device = types.SimpleNamespace(device_kind=kind)
    assert topology.peak_flops(device, "bfloat16") == pytest.approx(bfloat16)
    assert topology.peak_flops(device, "float32") == pytest.approx(float32)
    assert topology.peak_flops(jax.devices()[0], "float32") is None  # a CPU


def test_a_missing_compiler_for_gpus_is_reported_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"requires XLA's .* GPUs: pip install 'jax\[cuda13\]=="):
        topology.create("h100:8")


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_missing_compiler_is_reported_with_the_command_that_installs_it():
    with pytest.raises(UserError, match=r"requires the TPU's compiler: pip install 'jax\[tpu\]=="):
        topology.Slice("v5e:2x2")


def test_bandwidth_of_rings_lines_and_interleaved_groups():
    """A side of a v5e slice closes to a ring at 16 chips; interleaved groups share its links."""
    v5e = topology.CHIPS["v5e"]
    for shape, coordinates, num_links in (
        ((4, 4), [(0, 0), (1, 0), (2, 0), (3, 0)], 1),
        ((16, 16), [(0, i) for i in range(16)], 2),
        ((16, 16), [(0, i) for i in range(0, 16, 4)], 2 / 4),
        ((16, 16), [(i, j) for i in range(16) for j in range(16)], 4),
        ((4, 4), [(0, 0), (1, 0), (0, 1), (1, 1)], 2),
    ):
        bandwidth = topology.group_bandwidth(v5e, shape, coordinates)
        assert bandwidth == num_links * v5e.link_bandwidth
    # In three dimensions rings close only if all sides are multiples of four.
    v4, column = topology.CHIPS["v4"], [(0, 0, i) for i in range(4)]
    assert topology.group_bandwidth(v4, (2, 2, 4), column) == v4.link_bandwidth
    assert topology.group_bandwidth(v4, (4, 4, 4), column) == 2 * v4.link_bandwidth


@pytest.mark.compiler
@pytest.mark.parametrize(
    ("name", "num_devices"),
    [
        ("v5e:2x2", 4),
        ("v5e:32x32", 1024),
        ("v6e:16x16", 256),
        ("v4:2x2x1", 4),
        ("v5p:8x8x16", 1024),
    ],
)
def test_slices_have_one_device_per_chip(name, num_devices):
    assert len(topology.Slice(name).devices) == num_devices


@pytest.mark.compiler
@pytest.mark.parametrize(
    ("name", "num_devices", "shape"),
    [("v5e:2x2x2", 8, (2, 2)), ("v6e:4x4x3", 48, (4, 4)), ("v4:2x2x1x2", 8, (2, 2, 1))],
)
def test_several_slices(name, num_devices, shape):
    """A mesh over them is recognized, and has each slice's devices side by side along data."""
    slices = topology.Slice(name)
    assert (len(slices.devices), slices.shape) == (num_devices, shape)
    mesh = create_mesh(fsdp=2, devices=slices.devices)
    found = [device.slice_index for device in mesh.devices.ravel()]
    assert found == sorted(found)
    assert len(set(found)) == slices.num_slices
    with pytest.raises(UserError, match="config.mesh.slices is 1, but the TPUs are . slices"):
        create_mesh(slices=1, devices=slices.devices)
    with pytest.raises(UserError, match="doesn't fit data=1, fsdp="):
        create_mesh(data=1, fsdp=-1, devices=slices.devices)


@pytest.mark.compiler
def test_slices_that_libtpu_does_not_know_are_refused():
    with pytest.raises(UserError, match="--compile_for=v5e:3x5 isn't a slice that libtpu knows"):
        topology.Slice("v5e:3x5")
