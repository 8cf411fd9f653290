"""The command line `python -m vit_jax.pretrained`."""

import json
import pathlib
import re
import runpy
import sys

import pytest
from conftest import GOLDEN
from published import CASES, assert_same, golden_model, random_model

from vit_jax import pretrained
from vit_jax.errors import UserError
from vit_jax.pretrained import convert, export
from vit_jax.runs import run_folder

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


def test_sources_and_runs_are_not_overwritten(tmp_path, capsys, tiny_config):
    run, timm, npz = tmp_path / "run", tmp_path / "timm", tmp_path / "w.npz"
    (run / "checkpoints" / "60").mkdir(parents=True)
    run_folder.write_config(run, tiny_config)
    other = tmp_path / "settings of another program"
    other.mkdir()
    (other / "config.json").write_text('{"editor": "vi"}')
    timm.mkdir()
    (timm / "config.json").write_text('{"architecture": "vit_base_patch16_224"}')
    for source, target, format, message in (
        (run, run, "timm", "would overwrite the source: write to another path"),
        (npz, run, "hf", "is a run's folder, whose config.json would be overwritten: write to"),
        (npz, run / "checkpoints" / "60", "timm", "is among a run's checkpoints: write to another"),
        (timm, timm / ".." / "timm", "hf", "would overwrite the source"),
        (timm, timm / "model.safetensors", "timm", "would overwrite the source"),
        (timm / "model.safetensors", timm, "timm", "would overwrite the source"),
        (npz, npz, "google", "would overwrite the source"),
        ("gs://bucket/w.npz", "gs://bucket/w.npz", "google", "would overwrite the source"),
        (npz, "https://a.b/w.npz", "google", "must be a folder, or gs://BUCKET"),
        (npz, other, "hf", "isn't an exported model's: write to another folder"),
        (npz, tmp_path / "out.npz", "timm", "needs a folder or a .safetensors file"),
        (npz, tmp_path / "vit.pth", "timm", "needs a folder or a .safetensors file"),
        (npz, tmp_path / "vit.safetensors", "hf", "the format 'hf' needs a folder"),
        (npz, run / "config.json", "hf", "the format 'hf' needs a folder"),
    ):
        with pytest.raises(UserError, match=f"^{re.escape(str(target))}.*{message}"):
            export.check_target(target, format, source)
    export.check_target(run / "timm", "timm", run)  # beside its files
    export.check_target(timm, "timm", npz)  # written again

    before = (run / "config.json").read_text()
    assert convert.main([str(SOURCE), str(run), "--format=timm"]) == 2
    assert f"such as {run}/timm" in capsys.readouterr().err
    assert (run / "config.json").read_text() == before


def test_a_model_that_is_there_is_replaced_only_if_asked(tmp_path, capsys):
    target = tmp_path / "model"
    assert convert.main([str(SOURCE), str(target), "--format=hf"]) == 0
    assert convert.main([str(SOURCE), str(target), "--format=timm"]) == 2
    assert f"{target} exists: write to another path, or add --overwrite" in capsys.readouterr().err
    assert convert.main([str(SOURCE), str(target), "--format=timm", "--overwrite"]) == 0
    assert sorted(path.name for path in target.iterdir()) == ["config.json", "model.safetensors"]
    command = [str(target), str(tmp_path / "w.npz"), "--format=google", "--num_heads=2"]
    assert convert.main(command) == 2
    assert "num_heads is 2, but" in capsys.readouterr().err


def test_assumed_normalization_is_said(tmp_path, caplog):
    source = GOLDEN / CASES["timm_token"]["weights"]  # a file without config.json
    command = [str(source), str(tmp_path / "timm"), "--format=timm", "--num_heads=4"]
    assert convert.main(command) == 0
    assert "a mean and standard deviation of 0.5 are assumed" in caplog.text


def test_grid_of_the_source(tmp_path, capsys):
    model, params, _ = random_model((16, 48))
    source, target = tmp_path / "w.npz", tmp_path / "timm"
    pretrained.save(params, source, "google", model=model, image_size=(16, 48))
    command = [str(source), str(target), "--format=timm", "--num_heads=4"]
    assert convert.main(command) == 2
    assert "to convert, --grid rows columns" in capsys.readouterr().err
    assert convert.main([*command, "--grid", "2", "6"]) == 0
    assert_same(pretrained.load(target, model), params)


def test_mistakes_exit_with_2_and_one_line(tmp_path, capsys, monkeypatch):
    missing, target = str(tmp_path / "nothing"), tmp_path / "w.npz"
    arguments = ["vit_jax.pretrained", missing, str(target), "--format=google"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as exit:
        runpy.run_module("vit_jax.pretrained", run_name="__main__")
    assert exit.value.code == 2
    assert capsys.readouterr().err == f"There is no {missing}\n"
    assert not target.exists()


def test_known_weights_are_listed(capsys):
    """With numbers and sources; docs/published.md has the same table."""
    assert convert.main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = convert.published()
    assert len(lines) == len(rows) + 1
    known = next(line for line in lines if "deit3_base_patch16_224.fb_in1k" in line)
    assert known.split()[1:6] == ["224", "83.8", "224", "the", "model"]
    rows_of_dinov2 = [row for row in rows if "dinov2" in row["weights"]]
    assert {(row["image_size"], row["eval_size"]) for row in rows_of_dinov2} == {("518", "224")}
    documented = (pathlib.Path(__file__).parents[2] / "docs" / "published.md").read_text()
    for row in rows:
        numbers = (row["image_size"], row["accuracy"], row["eval_size"], row["measured"])
        assert f"| `{row['weights']}` | {' | '.join(numbers)} |" in documented
        assert bool(row["accuracy"]) == bool(row["measured"]) == bool(row["eval_size"])
        assert row["source"]
