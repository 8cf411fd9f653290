"""Parameters written for other codebases, and the logits that those compute with them.

tests/golden/exported.npz was recorded where timm and transformers were installed, by
`python tests/pretrained/test_export.py`.
"""

import dataclasses
import hashlib
import importlib.util
import json

import numpy as np
import pytest
from conftest import GOLDEN, tiny_model
from published import CASES, assert_same, compute_logits, golden_model, random_model, random_params
from safetensors.numpy import load_file

from vit_jax import models, pretrained
from vit_jax.errors import UserError
from vit_jax.pretrained import weights

# Name -> format, fields of the model, and the image size if it isn't 32x32.
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
PACKAGES = {"timm": "timm", "hf": "transformers"}


def save_model(name, folder):
    """Writes a row of MODELS; returns the model, its parameters and images."""
    format, fields, *size = MODELS[name]
    model, params, images = random_model(*size, **fields)
    pretrained.save(params, folder, format, model=model, image_size=images.shape[1:3])
    return model, params, images


def peer_logits(name, folder, images):
    """Returns the logits of timm or transformers for a saved model."""
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
    """Returns a hash of the names, shapes and bits of the tensors in a folder."""
    tensors = load_file(folder / "model.safetensors")
    text = hashlib.sha256()
    for name in sorted(tensors):
        text.update(f"{name}{tensors[name].shape}".encode() + tensors[name].tobytes())
    return text.hexdigest()


@pytest.mark.parametrize("name", MODELS)
def test_saved_model_computes_the_same_in_its_codebase_and_comes_back(name, tmp_path):
    model, params, images = save_model(name, tmp_path)
    logits = compute_logits(model, params, images)
    recorded = np.load(GOLDEN / "exported.npz", allow_pickle=False)
    assert digest(tmp_path) == str(recorded[f"{name}/digest"])
    np.testing.assert_allclose(logits, recorded[f"{name}/logits"], atol=1e-5, rtol=1e-5)
    if importlib.util.find_spec(PACKAGES[MODELS[name][0]]):
        peer = peer_logits(name, tmp_path, images)
        np.testing.assert_allclose(peer, logits, atol=1e-5, rtol=1e-5)

    assert_same(pretrained.load(tmp_path, model), params)
    fields = weights.read(tmp_path).model_fields
    fields.pop("posemb")  # fixed positions are stored as a table
    assert fields == {field: getattr(model, field) for field in fields}


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
def test_google_files_come_back_and_have_their_old_names(fields, tmp_path):
    model, params, _ = random_model(**fields)
    pretrained.save(params, tmp_path / "w.npz", "google", model=model, image_size=(32, 32))
    names = np.load(tmp_path / "w.npz").files
    assert "Transformer/encoderblock_1/LayerNorm_2/scale" in names
    assert "Transformer/encoderblock_1/MultiHeadDotProductAttention_1/query/kernel" in names
    assert not [name for name in names if "LayerNorm_1" in name]
    assert_same(pretrained.load(tmp_path / "w.npz", model), params)


@pytest.mark.parametrize("name", [n for n in CASES if not n.startswith("bigvision")])
def test_golden_files_are_reproduced(name, tmp_path):
    """Loading and saving gives the names and bits that the codebase itself wrote."""
    case, format = CASES[name], name.split("_")[0]
    model = golden_model(case)
    path = tmp_path / {"google": "w.npz", "timm": "w.safetensors", "hf": "hf"}[format]
    source = GOLDEN / case["weights"]
    pretrained.save(pretrained.load(source, model), path, format, model=model)
    if format == "hf":
        config, golden = (json.loads((p / "config.json").read_text()) for p in (path, source))
        assert config.items() <= golden.items()
        source, path = source / "model.safetensors", path / "model.safetensors"
    read = np.load if format == "google" else load_file
    theirs, ours = dict(read(source)), dict(read(path))
    assert set(theirs) == set(ours)
    for key in theirs:
        assert theirs[key].dtype == ours[key].dtype
        np.testing.assert_array_equal(theirs[key], ours[key])


def test_settings_are_saved_with_the_weights(tmp_path):
    """Class names, normalization, size and crop come back; another normalization is refused."""
    model, params, _ = random_model(gelu="exact", num_classes=3)
    mean, std = (0.4, 0.5, 0.6), (0.2,)
    for format in ("timm", "hf"):
        folder = tmp_path / format
        pretrained.save(
            params,
            folder,
            format,
            model=model,
            mean=mean,
            std=std,
            eval_crop=0.9,
            eval_method="bicubic",
            class_names=["cat", "dog", "emu"],
        )
        stored = weights.read(folder)
        assert stored.class_names == ("cat", "dog", "emu")
        assert (stored.mean, stored.std) == (mean, std * 3)
        assert stored.image_size == (32, 32)
        # The processor of transformers resizes to a square.
        assert stored.eval_crop == (0.9 if format == "timm" else "squeeze")
        assert stored.eval_method == "bicubic"
        pretrained.load(stored, model, mean=mean, std=std)
        with pytest.raises(UserError, match=r'--config.augment.mean="\(0.4, 0.5, 0.6\)"'):
            pretrained.load(stored, model, mean=(0.5,), std=std)
        with pytest.raises(UserError, match=r'set std=\(0.2,\) \(--config.augment.std="\(0.2,\)"'):
            pretrained.load(stored, model, mean=mean, std=(0.5,))


def test_squeezing_is_saved_for_timm(tmp_path):
    """Of methods that timm doesn't have, the closest is written."""
    model, params, _ = random_model(gelu="exact")
    for method, closest in (("area", "bilinear"), ("bicubic_aliased", "bicubic")):
        view = dict(eval_crop="squeeze", eval_method=method)
        pretrained.save(params, tmp_path / "timm", "timm", model=model, **view)
        config = json.loads((tmp_path / "timm/config.json").read_text())["pretrained_cfg"]
        assert (config["crop_mode"], config["crop_pct"]) == ("squash", 1.0)
        stored = weights.read(tmp_path / "timm")
        assert (stored.eval_crop, stored.eval_method) == ("squeeze", closest)


@pytest.mark.parametrize(
    ("format", "fields", "message"),
    [
        ("google", dict(gelu="exact"), "gelu 'exact'; in the format 'google' it must be 'tanh'"),
        ("google", dict(pool="map"), "pool 'map'.* must be 'cls' or 'gap' or 'none'"),
        ("timm", dict(representation_size=8), "representation_size 8.* must be None"),
        ("timm", dict(norm="post"), "norm 'post'"),
        ("timm", dict(layer_norm_eps=1e-4), r"layer_norm_eps 0.0001.*approximate=True \(--approx"),
        ("hf", dict(pool="map"), "pool 'map'; in the format 'hf' it must be 'cls'"),
        ("hf", dict(qk_norm=True), "qk_norm True; in the format 'hf' it must be False"),
        ("timm", dict(mlp_layer="swiglu", pool="map"), "'swiglu' and pool 'map', whose activation"),
        (
            "timm",
            dict(mlp_layer="swiglu", layer_norm_eps=1e-5),
            "'swiglu' and layer_norm_eps 1e-05",
        ),
        ("hf", dict(init_values=1.0, num_classes=None, mlp_dim=40), "40; .* must be 32 or 64"),
        (
            "hf",
            dict(init_values=1.0, num_classes=None, mlp_layer="swiglu", mlp_dim=40),
            "40; with width 32 and mlp_layer 'swiglu', .* must be 24 or 48",
        ),
        ("timm", dict(rope="axial"), "rope 'axial'; in the format 'timm' it must be 'none'"),
        ("google", dict(reg_tokens=1), "reg_tokens 1; in the format 'google' it must be 0"),
        ("hf", dict(resnet=dict(num_layers=(), width_factor=1), patch_size=2), "has resnet"),
        ("flax", dict(), "format is 'flax'; it must be 'google', 'timm' or 'hf'"),
    ],
)
def test_fields_that_a_format_cannot_represent_are_refused(format, fields, message, tmp_path):
    model = tiny_model(**fields)
    with pytest.raises(UserError, match=message):
        pretrained.save({}, tmp_path / "w", format, model=model)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize(
    ("fields", "approximated"),
    [
        (dict(scale_mlp=True, gelu="exact"), {}),
        (dict(scale_mlp=True, layer_norm_eps=1e-5, qk_norm=True, gelu="quick"), {}),
        (dict(scale_mlp=True, mlp_layer="swiglu", mlp_dim=36), {}),
        (dict(scale_mlp=True, pool="map"), {}),
        (dict(mlp_layer="swiglu", layer_norm_eps=1e-5), dict(layer_norm_eps=1e-6)),
    ],
)
def test_timm_has_every_field_that_was_saved(fields, approximated, pre_norm, tmp_path):
    """All fields come back from the names of timm's architectures and arguments."""
    model = tiny_model(**fields, pre_norm=pre_norm)
    params = random_params(model)
    pretrained.save(params, tmp_path, "timm", model=model, approximate=bool(approximated))
    same, same_params = pretrained.open(tmp_path)
    assert same == model.clone(**approximated)
    assert_same(same_params, params)
    arguments = json.loads((tmp_path / "config.json").read_text())["model_args"]
    assert arguments.get("scale_mlp_norm", False) == model.scale_mlp


@pytest.mark.parametrize("format", ["google", "timm", "hf"])
def test_unknown_fields_and_parameters_are_refused(format, tmp_path, monkeypatch):
    """What a changed model adds is never silently dropped, until a format can represent it."""

    class ChangedModel(models.VisionTransformer):
        temperature: float = 1.0

    model = ChangedModel(**{name: getattr(tiny_model(), name) for name in models.FIELDS})
    params = random_params(model)
    path = tmp_path / ("w.npz" if format == "google" else "w")
    pretrained.save(params, path, format, model=model)
    with pytest.raises(UserError, match=r"temperature 2.0; in the format .* it must be 1.0"):
        pretrained.save(params, path, format, model=dataclasses.replace(model, temperature=2.0))

    block = params["Transformer"]["encoderblock_1"]
    block["NoSuchLayer_0"] = {"gamma": np.ones(32, np.float32)}
    monkeypatch.setattr("vit_jax.pretrained.export.check_shapes", lambda *_: None)
    with pytest.raises(UserError, match="encoderblock_1/NoSuchLayer_0/gamma: .* no such parameter"):
        pretrained.save(params, path, format, model=model)
    del block["NoSuchLayer_0"]
    params["head"]["scale"] = np.ones(10, np.float32)  # its kernel has the name that it would get
    if format != "google":
        with pytest.raises(UserError, match="head/(scale|kernel): .* no such parameter"):
            pretrained.save(params, path, format, model=model)


def test_what_could_not_be_loaded_is_not_saved(tmp_path):
    model = tiny_model()
    params = random_params(model)
    path = tmp_path / "w"
    with pytest.raises(UserError, match=r"params must be the tree of parameters: variables\['par"):
        pretrained.save({"params": params}, path, "timm", model=model)
    broken = {**params, "head": {**params["head"], "bias": np.full(10, np.nan, np.float32)}}
    with pytest.raises(UserError, match="can't be saved: head/bias has NaN or infinity in 10"):
        pretrained.save(broken, path, "timm", model=model)
    with pytest.raises(UserError, match="mean, for pixels in .*, is 127.5"):
        pretrained.save(params, path, "timm", model=model, mean=(127.5,))
    with pytest.raises(UserError, match="eval_crop is 87.5; it must be a number > 0 and <= 1"):
        pretrained.save(params, path, "timm", model=model, eval_crop=87.5)
    with pytest.raises(UserError, match="eval_method is 'box'; it must be 'bilinear', 'bicubic',"):
        pretrained.save(params, path, "timm", model=model, eval_method="box")
    assert not path.exists()


def test_impossible_arguments_are_refused(tmp_path):
    model, params, _ = random_model(gelu="exact", num_classes=3)
    pretrained.save(params, tmp_path / "w.npz", "google", model=model, approximate=True)
    with pytest.raises(UserError, match="normalizes images with mean and std 0.5"):
        pretrained.save(
            params, tmp_path / "v.npz", "google", model=model.clone(gelu="tanh"), std=(1,)
        )
    for fields in (dict(depth=3), dict(num_heads=2), dict(num_classes=4), dict(pool="gap")):
        with pytest.raises(UserError, match="The parameters aren't this model's: .* is .*, not"):
            pretrained.save(params, tmp_path / "hf", "hf", model=model.clone(**fields))
    with pytest.raises(UserError, match="class_names has 2 names; .* model's 3 classes"):
        pretrained.save(params, tmp_path / "hf", "hf", model=model, class_names=["a", "b"])
    assert not (tmp_path / "hf").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file can't be written"):
        pretrained.save(params, tmp_path / "file", "hf", model=model)
    with pytest.raises(UserError, match="must have a name ending in .npz"):
        pretrained.save(params, tmp_path / "w", "google", model=model, approximate=True)


if __name__ == "__main__":  # records tests/golden/exported.npz
    import pathlib
    import tempfile

    recorded = {}
    for name in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            folder = pathlib.Path(folder)
            _, _, images = save_model(name, folder)
            recorded[f"{name}/logits"] = peer_logits(name, folder, images)
            recorded[f"{name}/digest"] = np.str_(digest(folder))
    np.savez_compressed(GOLDEN / "exported.npz", **recorded)
