"""Models of timm: names and layouts of their parameters, and their settings."""

import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from conftest import GOLDEN
from published import (
    CASES,
    assert_same,
    golden_model,
    golden_tensors,
    random_model,
)
from safetensors.numpy import save_file

from vit_jax import models, pretrained
from vit_jax.errors import UserError
from vit_jax.pretrained import weights
from vit_jax.pretrained.codebases import files
from vit_jax.pretrained.codebases.timm import reading


def test_timm_with_separate_projections_and_half_precision(tmp_path):
    tensors = golden_tensors("timm_token")
    for name in [name for name in tensors if ".qkv." in name]:
        for part, rows in zip("qkv", np.split(tensors[name], 3), strict=True):
            tensors[name.replace("qkv", f"{part}_proj")] = rows
        del tensors[name]
    path = tmp_path / "w.safetensors"
    save_file(tensors, path)
    model = golden_model(CASES["timm_token"])
    expected = pretrained.load(GOLDEN / CASES["timm_token"]["weights"], model)
    assert_same(pretrained.load(path, model), expected)
    for dtype in (np.float16, ml_dtypes.bfloat16):
        save_file({name: value.astype(dtype) for name, value in tensors.items()}, path)
        rounded = jax.tree.map(lambda leaf, d=dtype: leaf.astype(d).astype(np.float32), expected)
        assert_same(pretrained.load(path, model), rounded)


def test_timm_without_a_position_for_the_class_token(tmp_path):
    """Its config.json, or the grid, tells that there is none."""
    model, tensors = golden_model(CASES["timm_token"]), golden_tensors("timm_token")
    positions = tensors["pos_embed"]
    tensors["pos_embed"] = positions[:, 1:].copy()
    save_file(tensors, tmp_path / "model.safetensors")

    def check(path, **arguments):
        params = pretrained.load(path, model, **arguments)
        table = params["Transformer"]["posembed_input"]["pos_embedding"]
        np.testing.assert_array_equal(table[:, 1:], positions[:, 1:])
        assert not table[:, 0].any()

    check(tmp_path / "model.safetensors", grid=(4, 4))
    with pytest.raises(UserError, match="has 15 positions of patches .* give grid="):
        pretrained.load(tmp_path / "model.safetensors", model, (32, 32))
    for config in (  # what timm's config.json has for other models, and for FlexiViT
        {"model_args": {"no_embed_class": True}},
        {"pretrained_cfg": {"input_size": [3, 32, 32]}},
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        check(tmp_path)


def test_number_of_timm_positions_that_happens_to_be_a_square(tmp_path):
    """A grid of 4 x 6 and a row for the class token: 25 positions."""
    model, params, _ = random_model((32, 48))
    path = tmp_path / "w.safetensors"
    pretrained.save(params, path, "timm", model=model, image_size=(32, 48))
    assert_same(pretrained.load(path, model.clone(gelu="exact"), (32, 48)), params)
    for size in ((40, 40), (64, 64)):
        with pytest.raises(UserError, match="has 24 positions of patches and doesn't"):
            pretrained.load(path, model.clone(gelu="exact"), size)


def test_settings_of_timm(tmp_path):
    case = CASES["timm_token"]
    folder = tmp_path / "timm"
    folder.mkdir()
    shutil.copy(GOLDEN / case["weights"], folder / "model.safetensors")
    config = {"architecture": "vit_base_patch16_224", "model_args": {"act_layer": "gelu_tanh"}}
    config["model_args"]["num_heads"] = 8
    config["pretrained_cfg"] = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    (folder / "config.json").write_text(json.dumps(config))
    model = golden_model(case)
    with pytest.raises(UserError) as error:
        pretrained.load(folder, model)
    assert str(error.value) == (
        f"{folder} was trained with gelu 'tanh', num_heads 8, not 'exact', 4: set gelu='tanh', "
        "num_heads=8 (--config.model.gelu=tanh --config.model.num_heads=8)"
    )
    model = model.clone(gelu="tanh", num_heads=8)
    pretrained.load(folder, model, mean=(0.485, 0.456, 0.406))
    with pytest.raises(UserError, match=r'mean="\(0.485, 0.456, 0.406\)" --config.augment.std='):
        pretrained.load(folder, model, mean=(0.5,), std=(0.5,))


@pytest.mark.parametrize(
    ("settings", "view"),
    [
        ({"mean": [0.5]}, (0.875, "bicubic")),
        ({"crop_pct": 0.9, "interpolation": "bilinear"}, (0.9, "bilinear")),
        ({"crop_pct": 1.0, "crop_mode": "squash"}, ("squeeze", "bicubic")),
        ({}, (None, None)),
    ],
)
def test_preprocessing_of_timm(settings, view):
    """What is left out has timm's default; without a config.json, nothing is known."""
    path = GOLDEN / CASES["timm_token"]["weights"]
    read = weights.read_state_dict("w", files.read_safetensors(path), settings, {}, 4)
    assert (read.eval_crop, read.eval_method) == view


@pytest.mark.parametrize(
    ("settings", "view", "message"),
    [
        ({"interpolation": "lanczos"}, (0.875, "bicubic"), "interpolation is 'lanczos', which"),
        ({"crop_mode": "border"}, (0.875, "bicubic"), "crop_mode is 'border', which isn't supp"),
        ({"crop_mode": "squash"}, ("squeeze", "bicubic"), "squashed is 0.875, which isn't supp"),
    ],
)
def test_preprocessing_of_timm_that_is_not_supported(settings, view, message, caplog):
    assert (reading.eval_crop("w", settings), reading.eval_method("w", settings)) == view
    assert message in caplog.text


def test_pooling_and_positions_of_timm(tmp_path):
    tensors = golden_tensors("timm_avg_fcnorm")
    model = golden_model(CASES["timm_avg_fcnorm"])
    folder = tmp_path / "timm"
    folder.mkdir()

    def load(tensors, model=model, **config):
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config))
        return pretrained.load(folder, model, (32, 32))

    load(tensors, global_pool="avg")
    with pytest.raises(UserError, match="set pool_norm='after' "):
        load(tensors, model.clone(pool_norm="before"))
    with pytest.raises(UserError, match="pools by 'max', which isn't supported"):
        load(tensors, global_pool="avg", model_args={"global_pool": "max"})
    beside = golden_model(CASES["timm_token"], pool="gap", class_token=True, num_classes=5)
    params = load(golden_tensors("timm_token"), beside, global_pool="avg")
    assert params["cls"].shape == (1, 1, 32)
    without = {name: value for name, value in tensors.items() if name != "pos_embed"}
    with pytest.raises(UserError, match="--config.model.posemb=none"):
        load(without)
    params = load(without, model.clone(posemb="none"))
    assert "posembed_input" not in params["Transformer"]
    # The config.json of this model doesn't mention its GELU.
    with pytest.raises(UserError, match="--config.model.gelu=tanh"):
        load(tensors, architecture="vit_so400m_patch16_siglip_gap_256")


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("vit_large_patch14_clip_quickgelu_224", dict(layer_norm_eps=1e-5, gelu="quick")),
        ("vit_base_patch16_siglip_224", dict()),
        ("vit_so400m_patch16_siglip_gap_256", dict(gelu="tanh")),
        ("vit_giant_patch14_reg4_dinov2", dict(num_heads=24, no_embed_class=True)),
        ("eva02_base_patch14_448", dict(rope="axial", rope_temperature=1e4, rope_grid=(16, 16))),
        ("vit_base_patch16_rope_mixed_ape_224", dict(rope="mixed", rope_temperature=10.0)),
    ],
)
def test_what_names_of_timm_stand_for(name, fields):
    known = reading.fields_of_name(name)
    assert {field: known.get(field) for field in fields} == fields
    assert set(known) <= set(models.FIELDS)
