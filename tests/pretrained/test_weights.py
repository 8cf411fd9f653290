"""Files that are recognized, and files that can't be read."""

import json
import re
import zipfile

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import tiny_model
from published import (
    CASES,
    assert_loads,
    assert_same,
    flat_params,
    golden_model,
    golden_tensors,
)
from safetensors.numpy import save_file

from vit_jax import pretrained
from vit_jax.errors import UserError
from vit_jax.paths import POSEMB
from vit_jax.pretrained import weights


def test_npz_of_half_precision(weights_file):
    half = {n: v.astype(ml_dtypes.bfloat16) for n, v in flat_params(tiny_model()).items()}
    rounded = {name: value.astype(np.float32) for name, value in half.items()}
    assert_loads(weights_file(half), tiny_model(), rounded)


def write_safetensors(path, tensors):
    """Writes {name: (type, array)}; safetensors itself doesn't write every type."""
    header, data = {}, b""
    for name, (kind, value) in tensors.items():
        offsets = [len(data), len(data) + value.nbytes]
        header[name] = {"dtype": kind, "shape": value.shape, "data_offsets": offsets}
        data += value.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_safetensors_of_eight_bits(tmp_path):
    model, tensors = golden_model(CASES["timm_token"]), golden_tensors("timm_token")
    path = tmp_path / "w.safetensors"

    def rounded(dtype):
        return {n: v.astype(dtype) if v.ndim > 1 else v for n, v in tensors.items()}

    for kind, dtype in (("F8_E4M3", jnp.float8_e4m3fn), ("F8_E5M2", jnp.float8_e5m2)):
        save_file({n: v.astype(np.float32) for n, v in rounded(dtype).items()}, path)
        expected = pretrained.load(path, model)
        types = {1: kind, 4: "F32"}
        stored = {n: (types[v.itemsize], v) for n, v in rounded(dtype).items()}
        write_safetensors(path, stored)
        assert_same(pretrained.load(path, model), expected)
    write_safetensors(path, stored | {"scale": ("F8_E8M0", np.zeros(2, np.uint8))})
    with pytest.raises(UserError, match="scale is of type F8_E8M0, which isn't supported: save"):
        weights.read(path)


@pytest.mark.parametrize(
    "missing",
    [
        "head/bias",
        "Transformer/encoder_norm/scale",
        "Transformer/encoderblock_1/MlpBlock_0/Dense_0/bias",
    ],
)
def test_incomplete_files_are_named(missing, weights_file):
    params = flat_params(tiny_model())
    del params[missing]
    with pytest.raises(UserError, match=f"but lacks {missing}: the file is incomplete"):
        weights.read(weights_file(params))


def test_paths_that_are_none():
    for path in (None, "", 5):
        with pytest.raises(UserError, match="The path of the weights is"):
            weights.read(path)


@pytest.mark.parametrize("shape", [(1, 0, 32), (1, 1, 32), (17, 32), (2, 17, 32)])
def test_positions_must_be_a_table(shape, weights_file):
    path = weights_file(flat_params(tiny_model()) | {POSEMB: np.zeros(shape, np.float32)})
    with pytest.raises(UserError, match=rf"the positions are of shape {re.escape(str(shape))}; it"):
        weights.read(path)


def test_weights_must_be_finite_floating_point(weights_file):
    params = flat_params(tiny_model())
    for dtype in (np.int32, np.complex64):
        path = weights_file(params | {"head/bias": np.zeros(10, dtype)})
        with pytest.raises(UserError, match=f"w.npz: head/bias is of type {np.dtype(dtype)}; w"):
            weights.read(path)
    for value in (np.nan, np.inf, 1e300):
        path = weights_file(params | {"head/bias": np.array([*range(9), value])})
        with pytest.raises(UserError, match="w.npz: head/bias has NaN or infinity in 1 of its 10"):
            pretrained.load(path, tiny_model())


def test_addresses_of_web_pages():
    with pytest.raises(UserError, match="^https://a.b/w.npz can't be read: download it and give"):
        weights.read("https://a.b/w.npz")


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
