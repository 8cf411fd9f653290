"""Folders of weights, and weights that aren't there."""

import json
import shutil
import sys
import types

import pytest
from conftest import GOLDEN, tiny_model
from published import (
    CASES,
    assert_same,
    golden_model,
)
from safetensors.numpy import load_file, save_file

from vit_jax import pretrained
from vit_jax.errors import UserError


def test_damaged_and_incomplete_folders(tmp_path):
    folder = shutil.copytree(GOLDEN / "hf_vit.hf", tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    model = golden_model(CASES["hf_vit"])
    expected = pretrained.load(folder, model)
    for text, message in (
        ("{", "config.json is damaged"),
        ("[1]", "config.json holds a list; it must hold an object"),
    ):
        (folder / "config.json").write_text(text)
        with pytest.raises(UserError, match=message):
            pretrained.load(folder, model)
    (folder / "config.json").unlink()
    with pytest.raises(
        UserError, match="no config.json: download that too or, .* give the path of the file"
    ):
        pretrained.load(folder, model)
    (folder / "config.json").write_text(json.dumps(config))

    tensors = load_file(folder / "model.safetensors")  # in two shards
    names, files = sorted(tensors), ("model-00001-of-2.safetensors", "model-00002-of-2.safetensors")
    for file, part in zip(files, (names[:9], names[9:]), strict=True):
        save_file({name: tensors[name] for name in part}, folder / file)
    index = {"weight_map": {name: files[i >= 9] for i, name in enumerate(names)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    assert_same(pretrained.load(folder, model), expected)
    (folder / files[0]).unlink()
    with pytest.raises(UserError, match=f"lacks {files[0]}"):
        pretrained.load(folder, model)
    (folder / "model.safetensors.index.json").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="found only pytorch_model.bin, a pickle"):
        pretrained.load(folder, model)


def test_hf_names_are_downloaded(monkeypatch):
    model = golden_model(CASES["hf_vit"])
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "huggingface_hub", None)  # as if it weren't installed
        with pytest.raises(UserError, match="hf:google/vit needs huggingface_hub: pip install"):
            pretrained.load("hf:google/vit", model)
    downloads = []

    def snapshot_download(name, allow_patterns):
        downloads.append((name, "model*.safetensors*" in allow_patterns))
        if name == "nobody/nothing":
            raise OSError("404\nno such page")
        return str(GOLDEN / "hf_vit.hf")

    hub = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert_same(
        pretrained.load("hf:google/vit", model), pretrained.load(GOLDEN / "hf_vit.hf", model)
    )
    assert downloads == [("google/vit", True)]
    with pytest.raises(UserError, match="hf:nobody/nothing can't be downloaded: 404$"):
        pretrained.load("hf:nobody/nothing", model)


def test_git_lfs_pointers_are_recognized(tmp_path):
    """Alone, and as the file of a folder."""
    pointer = tmp_path / "model.safetensors"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1f\nsize 99\n")
    (tmp_path / "config.json").write_text("{}")
    for path in (pointer, tmp_path):
        with pytest.raises(UserError, match="is a Git LFS pointer instead of the weights: run"):
            pretrained.load(path, tiny_model())
