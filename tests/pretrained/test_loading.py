"""Published files as a model's parameters: logits, resolutions, depths and heads."""

import logging

import jax
import numpy as np
import pytest
from conftest import GOLDEN, tiny_model
from published import (
    CASES,
    assert_same,
    compute_logits,
    flat_params,
    flatten,
    golden_model,
    random_params,
    write_run,
)

import train
from configs import digits, vit_r50_b16
from vit_jax import checkpoint, models, pretrained
from vit_jax.errors import UserError
from vit_jax.models import posemb
from vit_jax.paths import POSEMB, unstack_blocks
from vit_jax.pretrained import resize
from vit_jax.runs import run_folder
from vit_jax.training import train_state


@pytest.mark.parametrize("name", CASES)
def test_golden_logits(name):
    case = CASES[name]
    model = golden_model(case)
    expected = np.load(GOLDEN / case["expected"], allow_pickle=False)
    params = pretrained.load(GOLDEN / case["weights"], model, expected["images"].shape[1:3])
    tolerance = 1e-5 if case.get("resnet") is None else 2e-5
    logits = compute_logits(model, params, expected["images"])
    np.testing.assert_allclose(logits, expected["logits"], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "hires" in case])
def test_golden_logits_at_another_resolution(name):
    case = CASES[name]
    model = golden_model(case)
    expected = np.load(GOLDEN / case["expected"], allow_pickle=False)
    images = expected["hires_images"]
    params = pretrained.load(GOLDEN / case["weights"], model, images.shape[1:3])
    logits = compute_logits(model, params, images)
    np.testing.assert_allclose(logits, expected["hires_logits"], atol=1e-5, rtol=1e-5)


def test_head_for_other_classes_is_replaced(weights_file, caplog):
    caplog.set_level("INFO", "vit_jax")
    path = weights_file(flat_params(tiny_model(representation_size=16)))
    for fields in (dict(num_classes=7, representation_size=16), dict(num_classes=10)):
        model = tiny_model(**fields, head_bias_init=-3.0)
        params = pretrained.load(path, model)
        assert not params["head"]["kernel"].any()
        assert (params["head"]["bias"] == -3.0).all()
        assert ("pre_logits" in params) == ("representation_size" in fields)
        warned = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
        assert f"the new head for {fields['num_classes']} starts at zero" in warned[-1]
    assert "head" not in pretrained.load(path, tiny_model(num_classes=None))
    with pytest.raises(UserError, match="a head for 10 classes after .*; the model needs one for"):
        pretrained.load(path, tiny_model(), new_head=False)
    wider = tiny_model(width=64, representation_size=16)  # not only the head differs
    with pytest.raises(UserError, match="bias is .* in the file and .* in the model"):
        pretrained.load(path, wider, new_head=False)


def test_image_size_is_the_file_s_by_default(weights_file):
    params = pretrained.load(weights_file(flat_params(tiny_model(), (48, 48))), tiny_model())
    assert position_table(params).shape == (1, 37, 32)


def test_differing_parameters_are_listed(weights_file):
    params = flat_params(tiny_model())
    path = weights_file(params)

    def message(path, model, image_size=32):
        with pytest.raises(UserError) as error:
            pretrained.load(path, model, image_size)
        assert "\n" not in str(error.value)
        return str(error.value)

    text = message(path, tiny_model(depth=3, mlp_dim=128))
    assert "it has depth 2, mlp_dim 64; " in text
    assert "encoderblock_{0,1}/MlpBlock_0/Dense_0/bias is (64,) in the file and (128,)" in text
    text = message(path, tiny_model(depth=3))
    missing = "encoderblock_2/LayerNorm_0/bias is missing in the file and (32,) in the model"
    assert missing in text
    text = message(path, tiny_model(), (32, 32, 1))
    assert "images of 3 channels, not 1: set config.dataset.channels to 3" in text
    assert "embedding/kernel is (8, 8, 3, 32) in the file and (8, 8, 1, 32) in the model" in text
    # Its new head, for another number of classes, has twice the width of the file.
    assert "it has width 32; " in message(path, tiny_model(width=64, num_classes=2))
    path = weights_file(params | {"surplus": np.zeros(2)})
    assert "surplus is (2,) in the file and missing in the model" in message(path, tiny_model())

    path = weights_file(flat_params(tiny_model(pool="map", num_classes=3)))
    text = message(path, models.create("B/16"), None)
    assert "it looks like a ViT of width 32, depth 2" in text
    assert "this model is ViT-B/16; it has patch_size 8, width 32, depth 2" in text
    assert "pool 'map'" in text
    assert text.endswith(" more parameters")
    assert len(text) < 1500
    text = message(path, tiny_model(num_classes=3))
    assert "MAPHead_0/LayerNorm_0/bias is (32,) in the file and missing in the model" in text


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    """The folder of a random model of 8x8 digits."""
    config = digits.get_config()
    config.update(num_classes=10, total_steps=1, best_metric="", eval_every_steps=0)
    config.model.update(width=32, depth=1, num_heads=2, mlp_dim=64)
    params = random_params(models.from_config(config), (8, 8), channels=1)
    workdir = tmp_path_factory.mktemp("runs") / "small"
    return write_run(workdir, config, params=params), config, params


@pytest.mark.slow
def test_run_starts_from_a_run_at_another_resolution(digits_run, tmp_path, monkeypatch, one_device):
    monkeypatch.setattr(train, "create_mesh", lambda **_: one_device)  # compiles faster than eight
    small, config, params = digits_run
    model = models.from_config(run_folder.read_config(small))
    assert_same(pretrained.load(small / "checkpoints" / "60", model, 8), params)

    config = config.copy_and_resolve_references()
    config.update(image_size=16, init_from=str(small))
    config.schedule.update(base_lr=0.0, warmup_steps=0)  # the parameters stay as they start
    train.train(config, tmp_path / "larger")
    _, trained = checkpoint.restore_params(tmp_path / "larger")
    resized = resize.resize_positions(position_table(params), (2, 2), (4, 4), False)
    np.testing.assert_array_equal(position_table(trained), resized)
    trained["Transformer"]["posembed_input"] = params["Transformer"]["posembed_input"]
    assert_same(trained, params)

    config.model.pool = "cls"
    with pytest.raises(UserError, match="--config.model.pool=gap"):
        train.train(config, tmp_path / "refused")
    assert not (tmp_path / "refused" / "config.json").exists()


@pytest.mark.slow
def test_digits_of_8x8_help_with_digits_of_16x16(tmp_path):
    """Accuracy after a few steps is higher than from scratch."""
    config = digits.get_config()
    config.update(total_steps=150, eval_every_steps=0, checkpoint_every_steps=0, best_metric="")
    config.mesh.data = 8
    config.model.update(width=32, depth=2, mlp_dim=64)
    config.schedule.warmup_steps = 20
    train.train(config, tmp_path / "small")
    config.update(total_steps=40, image_size=16)
    scratch = train.train(config, tmp_path / "scratch")
    config.init_from = str(tmp_path / "small")
    result = train.train(config, tmp_path / "larger")
    assert result["accuracy"] > scratch["accuracy"] + 0.05


@pytest.mark.slow
def test_hybrid_of_16x16_helps_with_32x32(tmp_path):
    """The second example of docs/weights.md, shorter."""
    config = vit_r50_b16.get_config("quick")
    config.update(total_steps=300, eval_every_steps=0)
    train.train(config, tmp_path / "small")
    config.update(total_steps=60, image_size=32)
    scratch = train.train(config, tmp_path / "scratch")
    config.init_from = str(tmp_path / "small")
    result = train.train(config, tmp_path / "larger")
    assert result["loss"] < scratch["loss"] - 0.1


def test_patches_are_resized_on_request(weights_file):
    params = flat_params(tiny_model())
    path = weights_file(params)
    model = tiny_model(patch_size=(16, 4))
    with pytest.raises(UserError, match=r"resize_patch=True \(--config.init_from_patch=resize\)"):
        pretrained.load(path, model, (64, 16))
    resized = pretrained.load(path, model, (64, 16), resize_patch=True)
    expected = resize.resize_patches(params["embedding/kernel"], (16, 4))
    np.testing.assert_array_equal(resized["embedding"]["kernel"], expected)


@pytest.mark.parametrize("scan", [False, True])
def test_deeper_models_are_filled(scan, weights_file):
    stored = random_params(tiny_model())
    path = weights_file(flatten(stored))
    model = tiny_model(depth=5, scan=scan)
    with pytest.raises(UserError, match=r"depth='stack' \(--config.init_from_depth=stack\)"):
        pretrained.load(path, model)

    def blocks(params):
        transformer = (unstack_blocks(params) if scan else params)["Transformer"]
        return [transformer[f"encoderblock_{i}"] for i in range(5)]

    for i, block in enumerate(blocks(pretrained.load(path, model, depth="stack"))):
        assert_same(block, stored["Transformer"][f"encoderblock_{i % 2}"])
    if scan:  # blocks are stacked only after they were added
        return
    model = tiny_model(depth=3)
    initial = jax.jit(lambda: train_state.init_params(model, (32, 32, 3), 3))()["Transformer"]
    filled = pretrained.load(path, model, depth="append", seed=3)["Transformer"]
    for i in range(2):
        assert_same(filled[f"encoderblock_{i}"], stored["Transformer"][f"encoderblock_{i}"])
    jax.tree.map(  # computed by another program, so the same up to rounding
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        filled["encoderblock_2"],
        initial["encoderblock_2"],
    )
    with pytest.raises(UserError, match="depth .* is 'double'; it must be 'stack' or 'append'"):
        pretrained.load(path, model, depth="double")
    with pytest.raises(UserError, match="encoderblock_1/.* in the file and missing in the model"):
        pretrained.load(path, tiny_model(depth=1), depth="stack")


def test_grids_that_are_no_square(weights_file):
    model = tiny_model()
    params = flat_params(model, (16, 48))
    path = weights_file(params)
    with pytest.raises(UserError, match=r"no square: give grid=.*--config.init_from_grid="):
        pretrained.load(path, model, (32, 32))
    with pytest.raises(UserError, match=r"is \(3, 5\); it must have the 12 positions"):
        pretrained.load(path, model, (32, 32), grid=(3, 5))
    same = pretrained.load(path, model, (16, 48))
    np.testing.assert_array_equal(position_table(same), params[POSEMB])
    resized = pretrained.load(path, model, (32, 32), grid=(2, 6))
    expected = resize.resize_positions(params[POSEMB], (2, 6), (4, 4), True)
    np.testing.assert_array_equal(position_table(resized), expected)
    # 16 positions may be 4 x 4 or 2 x 8.
    path = weights_file(flat_params(model))
    with pytest.raises(UserError, match="which is 2x8 or 4x4: give grid"):
        pretrained.load(path, model, (16, 64))
    pretrained.load(path, model, (16, 64), grid=(4, 4))


def position_table(params):
    return params["Transformer"]["posembed_input"]["pos_embedding"]


def test_tables_of_fixed_positions(weights_file):
    """A file may hold the positions that the model computes; other ones are refused."""
    fixed, learned = tiny_model(posemb="sincos2d"), tiny_model()
    stored = flat_params(learned)
    path = weights_file(stored | {POSEMB: posemb.table("sincos2d", 4, 4, 32, True)})
    params = pretrained.load(path, fixed)
    assert "posembed_input" not in params["Transformer"]
    images = np.random.default_rng(0).normal(size=(1, 32, 32, 3)).astype(np.float32)
    np.testing.assert_allclose(
        compute_logits(fixed, params, images),
        compute_logits(learned, pretrained.load(path, learned), images),
        atol=1e-6,
    )
    with pytest.raises(UserError, match="posemb 'learned'"):
        pretrained.load(weights_file(stored), fixed)


def test_impossible_fields_of_a_configuration(tiny_config):
    for field, value, message in (
        ("init_from_grid", (2, 2), r"is \(2, 2\), which needs config.init_from"),
        ("init_from_grid", 4, r"is 4; it must be \(rows, columns\)"),
        ("init_from_grid", (-4, -4), r"is \(-4, -4\); it must be .*, both above 0"),
        ("init_from_patch", "crop", "must be None or 'resize'"),
        ("init_from_depth", "double", "must be None, 'stack' or 'append'"),
    ):
        config = tiny_config.copy_and_resolve_references()
        config[field] = value
        with pytest.raises(UserError, match=f"config.{field}.*{message}"):
            pretrained.check(config)
