"""Files that are recognized, and files that can't be read."""

import zipfile

import ml_dtypes
import numpy as np
import pytest
from conftest import tiny_model
from published import assert_loads, flat_params
from safetensors.numpy import save_file

from vit_jax import pretrained
from vit_jax.errors import UserError
from vit_jax.pretrained import weights


def test_npz_of_half_precision(weights_file):
    half = {n: v.astype(ml_dtypes.bfloat16) for n, v in flat_params(tiny_model()).items()}
    rounded = {name: value.astype(np.float32) for name, value in half.items()}
    assert_loads(weights_file(half), tiny_model(), rounded)


def test_google_files_imply_their_fields_and_normalization(weights_file):
    path = weights_file(flat_params(tiny_model()))
    with pytest.raises(UserError, match="gelu=tanh --config.model.layer_norm_eps=1e-06"):
        pretrained.load(path, tiny_model(gelu="exact", layer_norm_eps=1e-12))
    with pytest.raises(UserError, match="augment.mean="):
        pretrained.load(path, tiny_model(), mean=(0.485, 0.456, 0.406))
    mixer = {"MixerBlock_0/token_mixing/Dense_0/kernel": np.zeros(1)}
    with pytest.raises(UserError, match="looks like an MLP-Mixer"):
        weights.read(weights_file(mixer))


def test_unreadable_files(tmp_path):
    params = flat_params(tiny_model())
    whole = tmp_path / "whole.npz"
    np.savez(whole, **params)

    def check(name, content, message):
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError, match=message) as error:
            weights.read(path)
        assert "\n" not in str(error.value)

    content = whole.read_bytes()
    check("nothing.npz", None, "There is no")
    check("cut.npz", content[: len(content) // 2], "is damaged")
    check("empty.npz", b"", "is neither an .npz nor a .safetensors file")
    check("text.npz", b"hello, this is a text", "is neither")
    np.savez(tmp_path / "pickled.npz", **params, extra=np.array([{"a": 1}], object))
    check("pickled.npz", None, "holds pickled objects, which are never read")
    with zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w") as file:
        file.writestr("archive/data.pkl", b"\x80\x02}q\x00.")
    check("pytorch_model.bin", None, "PyTorch pickles are never read; save the weights as .safe")
    np.savez_compressed(tmp_path / "compressed.npz", **params)
    content = bytearray((tmp_path / "compressed.npz").read_bytes())
    content[400:500] = bytes(100)
    check("compressed.npz", content, "compressed.npz is damaged")
    save_file({"conv1.weight": np.zeros(3, np.float32)}, tmp_path / "resnet.safetensors")
    check("resnet.safetensors", None, "holds no Vision Transformer")
    content = (tmp_path / "resnet.safetensors").read_bytes()
    check("cut.safetensors", content[:-4], "is damaged")
    (tmp_path / "folder").mkdir()
    check("folder", None, "holds no weights: expected model.safetensors, found none")
