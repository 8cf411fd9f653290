"""The command line `python -m vit_jax.pretrained`."""

import json
import runpy
import sys

import pytest
from conftest import GOLDEN
from published import CASES, assert_same, golden_model

from vit_jax import pretrained
from vit_jax.pretrained import convert

SOURCE = GOLDEN / CASES["google_token"]["weights"]


def test_conversion_with_class_names(tmp_path, capsys):
    target = tmp_path / "hf"
    (tmp_path / "names.txt").write_text("\n".join(f"class {i}" for i in range(10)))
    names = f"--class_names={tmp_path / 'names.txt'}"
    assert convert.main([str(SOURCE), str(target), "--format=hf", names]) == 0
    assert "a ViT of width 32, depth 2" in capsys.readouterr().out
    config = json.loads((target / "config.json").read_text())
    assert config["id2label"]["7"] == "class 7"
    model = golden_model(CASES["google_token"])
    assert_same(pretrained.load(target, model), pretrained.load(SOURCE, model))


def test_image_size_and_approximation(tmp_path, capsys):
    """A model with exact GELU for Google's code, and positions resized on the way."""
    case = CASES["timm_token"]
    target = str(tmp_path / "w.npz")
    command = [str(GOLDEN / case["weights"]), target, "--format=google", "--num_heads=4"]
    assert convert.main(command) == 2
    assert "approximate=True (--approximate)" in capsys.readouterr().err
    assert convert.main([*command, "--approximate", "--image_size", "16", "48"]) == 0
    model = golden_model(case, gelu="tanh", layer_norm_eps=1e-6)
    params = pretrained.load(target, model, (16, 48))
    assert params["Transformer"]["posembed_input"]["pos_embedding"].shape == (1, 13, 32)


def test_mistakes_exit_with_2_and_one_line(tmp_path, capsys, monkeypatch):
    missing, target = str(tmp_path / "nothing"), tmp_path / "w.npz"
    arguments = ["vit_jax.pretrained", missing, str(target), "--format=google"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as exit:
        runpy.run_module("vit_jax.pretrained", run_name="__main__")
    assert exit.value.code == 2
    assert capsys.readouterr().err == f"There is no {missing}\n"
    assert not target.exists()
