"""Parameters written for other codebases, and what those compute with them.

tests/golden/exported.npz was recorded where timm and transformers were installed, by
`python tests/test_export.py`.
"""

import hashlib
import importlib.util
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import GOLDEN, randomized, tiny_model
from published import CASES, golden_model
from safetensors.numpy import load_file

from vit_jax import pretrained
from vit_jax.errors import UserError
from vit_jax.pretrained import export, weights

# format, fields of the model, and its images where they aren't 32x32.
MODELS = {
    "timm": ("timm", dict(gelu="exact")),
    "timm_tanh": ("timm", dict()),
    "timm_map": ("timm", dict(gelu="exact", pool="map", num_classes=3)),
    "timm_gap": ("timm", dict(gelu="exact", pool="gap")),
    "timm_gap_norm_after": ("timm", dict(gelu="exact", pool="gap", pool_norm="after", scan=True)),
    "timm_sincos": ("timm", dict(gelu="exact", pool="gap", posemb="sincos2d")),
    "timm_sixth": ("timm", dict(gelu="exact"), (32, 48)),  # 4 x 6 + 1 positions: a square number
    "timm_wide": ("timm", dict(gelu="exact", patch_size=(8, 4), mlp_dim=50), (16, 48)),
    "timm_features": ("timm", dict(gelu="exact", num_classes=None)),
    "hf": ("hf", dict(gelu="exact", layer_norm_eps=1e-12)),
    "hf_tanh": ("hf", dict(scan=True)),
    "hf_wide": ("hf", dict(gelu="exact", mlp_dim=50), (16, 48)),
    "hf_sincos": ("hf", dict(gelu="exact", posemb="sincos2d", num_heads=2)),
    "hf_features": ("hf", dict(gelu="exact", num_classes=None)),
}
PEERS = {"timm": "timm", "hf": "transformers"}


def drawn(fields, size=(32, 32)):
    """A model, parameters and images."""
    model = tiny_model(**fields)
    images = np.random.default_rng(1).normal(size=(2, *size, 3)).astype(np.float32)
    return model, randomized(jax.jit(model.init)(jax.random.key(0), images)["params"]), images


def written(name, folder):
    format, fields, *size = MODELS[name]
    model, params, images = drawn(fields, *size)
    export.save(params, folder, format, model=model, image_size=images.shape[1:3])
    return model, params, images


def logits_elsewhere(name, folder, images):
    import torch

    if MODELS[name][0] == "timm":
        import timm

        model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    else:
        import transformers

        architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
        arguments = {} if "Classification" in architecture else {"add_pooling_layer": False}
        model = getattr(transformers, architecture).from_pretrained(folder, **arguments)
    with torch.no_grad():
        outputs = model.eval()(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    if hasattr(outputs, "last_hidden_state"):
        outputs = outputs.last_hidden_state[:, 0]
    return getattr(outputs, "logits", outputs).numpy()


def digest(folder):
    """Of names, shapes and bits of the tensors in a folder."""
    tensors = load_file(folder / "model.safetensors")
    text = hashlib.sha256()
    for name in sorted(tensors):
        text.update(f"{name}{tensors[name].shape}".encode() + tensors[name].tobytes())
    return text.hexdigest()


@pytest.mark.parametrize("name", MODELS)
def test_other_codes_compute_the_same_with_what_is_written(name, tmp_path):
    model, params, images = written(name, tmp_path)
    logits = model.apply({"params": params}, images)
    recorded = np.load(GOLDEN / "exported.npz", allow_pickle=False)
    assert digest(tmp_path) == str(recorded[f"{name}/digest"])
    np.testing.assert_allclose(logits, recorded[f"{name}/logits"], atol=1e-5, rtol=1e-5)
    if importlib.util.find_spec(PEERS[MODELS[name][0]]):
        elsewhere = logits_elsewhere(name, tmp_path, images)
        np.testing.assert_allclose(elsewhere, logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_in_and_out_is_the_identity(name, tmp_path):
    model, params, images = written(name, tmp_path)
    loaded = pretrained.load(tmp_path, model)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    fields = weights.read(tmp_path).model_fields
    assert {name: getattr(model, name) for name in fields if name != "posemb"} == {
        name: value for name, value in fields.items() if name != "posemb"
    }


@pytest.mark.parametrize(
    "fields",
    [
        dict(),
        dict(pool="gap", scan=True),
        dict(representation_size=16),
        dict(posemb="sincos2d"),
        dict(posemb="none"),
        dict(num_classes=None),
        dict(patch_size=2, resnet=dict(num_layers=(1, 1), width_factor=0.5)),
    ],
)
def test_in_and_out_of_googles_files(fields, tmp_path):
    model, params, images = drawn(fields)
    export.save(params, tmp_path / "w.npz", "google", model=model, image_size=(32, 32))
    names = np.load(tmp_path / "w.npz").files
    assert "Transformer/encoderblock_1/LayerNorm_2/scale" in names
    assert "Transformer/encoderblock_1/MultiHeadDotProductAttention_1/query/kernel" in names
    assert not [name for name in names if "LayerNorm_1" in name]
    jax.tree.map(np.testing.assert_array_equal, pretrained.load(tmp_path / "w.npz", model), params)


@pytest.mark.parametrize("name", [n for n in CASES if not n.startswith("bigvision")])
def test_golden_files_come_out_as_they_went_in(name, tmp_path):
    """Bit for bit and name by name: what their own codes wrote."""
    case, format = CASES[name], name.split("_")[0]
    model = golden_model(case)
    path = tmp_path / {"google": "w.npz", "timm": "w.safetensors", "hf": "hf"}[format]
    params = pretrained.load(GOLDEN / case["weights"], model)
    export.save(params, path, format, model=model)
    if format == "google":
        theirs, ours = np.load(GOLDEN / case["weights"]), np.load(path)
    elif format == "timm":
        theirs, ours = load_file(GOLDEN / case["weights"]), load_file(path)
    else:
        folder = GOLDEN / case["weights"]
        theirs, ours = (
            load_file(folder / "model.safetensors"),
            load_file(path / "model.safetensors"),
        )
        config = json.loads((path / "config.json").read_text())
        golden_config = json.loads((folder / "config.json").read_text())
        assert config.items() <= golden_config.items()
    assert set(theirs) == set(ours)
    for key in theirs:
        assert theirs[key].dtype == ours[key].dtype
        np.testing.assert_array_equal(theirs[key], ours[key])


def test_what_comes_with_the_weights(tmp_path):
    """Class names, normalisation and size come back; a mismatch is refused by field."""
    model, params, _ = drawn(dict(gelu="exact", num_classes=3))
    about = dict(class_names=["cat", "dog", "emu"], mean=(0.4, 0.5, 0.6), std=(0.2,))
    about["keep"] = 0.9
    for format in ("timm", "hf"):
        folder = tmp_path / format
        export.save(params, folder, format, model=model, **about)
        found = weights.read(folder)
        assert found.class_names == ("cat", "dog", "emu")
        assert found.mean == (0.4, 0.5, 0.6)
        assert found.std == (0.2, 0.2, 0.2)
        assert found.image_size == (32, 32)
        assert found.keep == (0.9 if format == "timm" else 1.0)
        pretrained.load(folder, model, mean=(0.4, 0.5, 0.6), std=(0.2,))
        with pytest.raises(UserError, match=r'--config.augment.mean="\(0.4, 0.5, 0.6\)"'):
            pretrained.load(folder, model, mean=(0.5,), std=(0.2,))
        with pytest.raises(UserError, match=r'--config.augment.std="\(0.2,\)"'):
            pretrained.load(folder, model, mean=(0.4, 0.5, 0.6), std=(0.5,))


def test_models_that_the_other_codes_do_not_have(tmp_path):
    for format, fields, match in (
        ("google", dict(gelu="exact"), "no model with gelu 'exact', only with 'tanh'"),
        ("google", dict(pool="map"), "no model with pool 'map'"),
        ("timm", dict(representation_size=8), "no model with representation_size 8"),
        ("timm", dict(norm="post"), "no model with norm 'post'"),
        ("hf", dict(pool="gap"), "no model with pool 'gap', only with 'cls'"),
        ("hf", dict(resnet=dict(num_layers=(), width_factor=1), patch_size=2), "with resnet"),
        ("flax", dict(), "format is 'flax'; it can be 'google', 'timm', 'hf'"),
    ):
        model, params, _ = drawn(fields)
        with pytest.raises(UserError, match=match):
            export.save(params, tmp_path / "w.npz", format, model=model)
        assert not list(tmp_path.iterdir())
    model, params, _ = drawn(dict(gelu="exact", num_classes=3))
    export.save(params, tmp_path / "w.npz", "google", model=model, approximate=True)
    with pytest.raises(UserError, match="normalises images with mean and std 0.5"):
        export.save(params, tmp_path / "v.npz", "google", model=tiny_model(num_classes=3), std=(1,))
    for strange in (dict(depth=3), dict(num_heads=2), dict(num_classes=4)):
        other = tiny_model(**{"gelu": "exact", "num_classes": 3, **strange})
        with pytest.raises(UserError, match="The parameters aren't this model's: .* is .*, not"):
            export.save(params, tmp_path / "hf", "hf", model=other)
    (tmp_path / "a file").write_text("")
    with pytest.raises(UserError, match="a file can't be written"):
        export.save(params, tmp_path / "a file", "hf", model=model)
    assert not (tmp_path / "hf").exists()
    with pytest.raises(UserError, match="2 class names for a head of 3 classes"):
        export.save(params, tmp_path / "hf", "hf", model=model, class_names=["a", "b"])
    with pytest.raises(UserError, match="ends in .npz"):
        export.save(params, tmp_path / "w", "google", model=model, approximate=True)


def test_the_command_line(tmp_path):
    def convert(*arguments):
        command = [sys.executable, "-m", "vit_jax.pretrained", *map(str, arguments)]
        done = subprocess.run(command, cwd=GOLDEN.parents[1], capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    case = CASES["google_token"]
    source = GOLDEN / case["weights"]
    (tmp_path / "names.txt").write_text("\n".join(f"class {i}" for i in range(10)))
    code, text = convert(
        source, tmp_path / "hf", "--format=hf", f"--class_names={tmp_path / 'names.txt'}"
    )
    assert (code, "a ViT of width 32, depth 2" in text) == (0, True)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["id2label"]["7"] == "class 7"
    model = golden_model(case)
    expected = pretrained.load(source, model)
    jax.tree.map(np.testing.assert_array_equal, pretrained.load(tmp_path / "hf", model), expected)
    code, text = convert(tmp_path / "nothing", tmp_path / "w.npz", "--format=google")
    assert (code, text) == (2, f"There is no {tmp_path / 'nothing'}\n")
    assert not (tmp_path / "w.npz").exists()


if __name__ == "__main__":  # records
    import pathlib
    import tempfile

    found = {}
    for name in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            folder = pathlib.Path(folder)
            _, _, images = written(name, folder)
            found[f"{name}/logits"] = logits_elsewhere(name, folder, images)
            found[f"{name}/digest"] = np.str_(digest(folder))
    np.savez_compressed(GOLDEN / "exported.npz", **found)
