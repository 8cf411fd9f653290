"""Published files as a model's parameters: logits, resolutions, depths, heads; runs that go on."""

import flax
import jax
import numpy as np
import pytest
from conftest import GOLDEN, randomized, tiny_model
from published import CASES, assert_loads, flat_params, golden_model
from safetensors.numpy import save_file

import train
from configs import digits, vit_r50_b16
from vit_jax import models, pretrained
from vit_jax.errors import UserError
from vit_jax.models import posemb
from vit_jax.models.stacking import stack_blocks, unstack_blocks
from vit_jax.pretrained import resize
from vit_jax.runs import checkpoint, run_folder
from vit_jax.training import train_state


@pytest.mark.parametrize("name", CASES)
def test_golden_logits(name):
    case = CASES[name]
    model = golden_model(case)
    expected = np.load(GOLDEN / case["expected"], allow_pickle=False)
    params = pretrained.load(GOLDEN / case["weights"], model, expected["images"].shape[1:3])
    tolerance = 1e-5 if case.get("resnet") is None else 2e-5
    logits = model.apply({"params": params}, expected["images"])
    np.testing.assert_allclose(logits, expected["logits"], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "hires" in case])
def test_golden_logits_at_another_resolution(name):
    case = CASES[name]
    model = golden_model(case)
    expected = np.load(GOLDEN / case["expected"], allow_pickle=False)
    images = expected["hires_images"]
    params = pretrained.load(GOLDEN / case["weights"], model, images.shape[1:3])
    logits = model.apply({"params": params}, images)
    np.testing.assert_allclose(logits, expected["hires_logits"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prefix", ["", "params/", "opt/target/"])
@pytest.mark.parametrize("numbering", ["old", "new"])
def test_flax_files_of_all_ages(prefix, numbering, tmp_path):
    model = tiny_model(representation_size=16)
    ours = flat_params(model)
    theirs = dict(ours)
    if numbering == "old":
        old = {"LayerNorm_1": "LayerNorm_2", "MlpBlock_0": "MlpBlock_3"}
        old["MultiHeadDotProductAttention_0"] = "MultiHeadDotProductAttention_1"
        for new, name in old.items():
            theirs = {key.replace(new, name): value for key, value in theirs.items()}
    np.savez(tmp_path / "w.npz", **{prefix + name: value for name, value in theirs.items()})
    assert_loads(tmp_path / "w.npz", model, ours)


@pytest.mark.parametrize("inlined", [True, False])
def test_big_vision_with_map_head_scan_and_positions_at_the_top(inlined, tmp_path):
    model = tiny_model(pool="map", scan=True)
    ours = flat_params(model)
    theirs = dict(ours)
    theirs["pos_embedding"] = theirs.pop(pretrained.POSEMB)
    if inlined:
        theirs = {name.replace("MAPHead_0/", "", 1): v for name, v in theirs.items()}
    np.savez(tmp_path / "w.npz", **theirs)
    assert_loads(tmp_path / "w.npz", model, ours)


def test_stacked_and_plain_blocks_go_either_way(tmp_path):
    plain, scanned = tiny_model(), tiny_model(scan=True)
    ours = flat_params(plain)
    tree = flax.traverse_util.unflatten_dict(ours, sep="/")
    stacked = flax.traverse_util.flatten_dict(stack_blocks(tree), sep="/")
    for theirs in (ours, stacked):
        np.savez(tmp_path / "w.npz", **theirs)
        assert_loads(tmp_path / "w.npz", plain, ours)
        assert_loads(tmp_path / "w.npz", scanned, stacked)


def test_a_head_for_other_classes_starts_anew(tmp_path, caplog):
    caplog.set_level("INFO", "vit_jax")
    ours = flat_params(tiny_model(representation_size=16))
    np.savez(tmp_path / "w.npz", **ours)
    for fields in (dict(num_classes=7, representation_size=16), dict(num_classes=10)):
        model = tiny_model(**fields, head_bias_init=-3.0)
        params = pretrained.load(tmp_path / "w.npz", model)
        assert not params["head"]["kernel"].any()
        assert (params["head"]["bias"] == -3.0).all()
        assert ("pre_logits" in params) == ("representation_size" in fields)
        assert f"one for {fields['num_classes']} classes starts at zero" in caplog.text
    assert "head" not in pretrained.load(tmp_path / "w.npz", tiny_model(num_classes=None))


def test_the_size_of_the_images_is_that_of_the_file(tmp_path):
    ours = flat_params(tiny_model(), size=48)
    np.savez(tmp_path / "w.npz", **ours)
    params = pretrained.load(tmp_path / "w.npz", tiny_model())
    assert params["Transformer"]["posembed_input"]["pos_embedding"].shape == (1, 37, 32)


def test_what_can_be_wrong_with_a_file(tmp_path):
    model = tiny_model()
    ours = flat_params(model)
    whole = tmp_path / "whole.npz"
    np.savez(whole, **ours)

    def message(path, model=model):
        with pytest.raises(UserError) as raised:
            pretrained.load(path, model, (32, 32))
        assert "\n" not in str(raised.value)
        return str(raised.value)

    def file(name, content):
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    content = whole.read_bytes()
    assert "There is no" in message(tmp_path / "nothing.npz")
    assert "is damaged" in message(file("cut.npz", content[: len(content) // 2]))
    assert "is neither an .npz nor a .safetensors file" in message(file("empty.npz", b""))
    assert "is neither" in message(file("text.npz", b"hello, this is a text"))
    np.savez(tmp_path / "pickled.npz", **ours, extra=np.array([{"a": 1}], object))
    assert "isn't unpickled" in message(tmp_path / "pickled.npz")
    save_file({"conv1.weight": np.zeros(3, np.float32)}, tmp_path / "resnet.safetensors")
    assert "holds no Vision Transformer" in message(tmp_path / "resnet.safetensors")
    content = (tmp_path / "resnet.safetensors").read_bytes()
    assert "is damaged" in message(file("cut.safetensors", content[:-4]))
    assert "holds no weights: expected a model.safetensors, found none" in message(tmp_path)

    text = message(whole, tiny_model(depth=3, mlp_dim=128))
    assert "encoderblock_2/LayerNorm_0/bias missing there, (32,) here" in text
    assert "encoderblock_{0,1}/MlpBlock_0/Dense_0/bias (64,) there, (128,) here" in text
    np.savez(whole, **ours, surplus=np.zeros(2, np.float32))
    assert "surplus (2,) there, missing here" in message(whole)
    with pytest.raises(UserError, match=r"embedding/kernel \(8, 8, 3, 32\) there, \(8, 8, 1, 32\)"):
        pretrained.load(whole, model, (32, 32, 1))


def test_a_run_starts_from_a_run_at_another_resolution(tmp_path):
    """Digits of 8x8, then of 16x16: better than from scratch in the same few steps."""
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
    # Of a step; and what the run's own model says of its parameters.
    config.init_from = str(tmp_path / "small" / "checkpoints" / "150")
    model = models.from_config(run_folder.read_config(tmp_path / "small"))
    params = pretrained.load(config.init_from, model, (8, 8))
    _, restored = checkpoint.restore_params(tmp_path / "small")
    jax.tree.map(np.testing.assert_array_equal, params, restored)
    config.model.pool = "cls"
    with pytest.raises(UserError, match="--config.model.pool=gap"):
        train.train(config, tmp_path / "refused")
    assert not (tmp_path / "refused" / "config.json").exists()


@pytest.mark.slow
def test_a_hybrid_goes_on_at_another_resolution(tmp_path):
    """The README's second example, shorter: better than from scratch in the same steps."""
    config = vit_r50_b16.get_config("quick")
    config.update(total_steps=300, eval_every_steps=0)
    train.train(config, tmp_path / "small")
    config.update(total_steps=60, image_size=32)
    scratch = train.train(config, tmp_path / "scratch")
    config.init_from = str(tmp_path / "small")
    result = train.train(config, tmp_path / "larger")
    assert result["loss"] < scratch["loss"] - 0.1


def test_patches_of_another_size_on_request(weights_file):
    path = weights_file(flat_params(tiny_model()))
    model = tiny_model(patch_size=(16, 4))
    with pytest.raises(UserError, match="--config.init_from_patch=resize"):
        pretrained.load(path, model, (64, 16))
    params = pretrained.load(path, model, (64, 16), resize_patch=True)
    expected = resize.resize_patches(flat_params(tiny_model())["embedding/kernel"], (16, 4))
    np.testing.assert_array_equal(params["embedding"]["kernel"], expected)


@pytest.mark.parametrize("scan", [False, True])
def test_a_deeper_model_is_filled(scan, weights_file):
    ours = flat_params(tiny_model())
    path = weights_file(ours)
    model = tiny_model(depth=5, scan=scan)
    with pytest.raises(UserError, match="--config.init_from_depth=stack"):
        pretrained.load(path, model)

    def block(params, i):
        transformer = (unstack_blocks(params) if scan else params)["Transformer"]
        return flax.traverse_util.flatten_dict(transformer[f"encoderblock_{i}"], sep="/")

    def theirs(i):
        prefix = f"Transformer/encoderblock_{i}/"
        return {n.removeprefix(prefix): v for n, v in ours.items() if n.startswith(prefix)}

    params = pretrained.load(path, model, depth="stack")
    for i in range(5):
        jax.tree.map(np.testing.assert_array_equal, block(params, i), theirs(i % 2))
    params = pretrained.load(path, model, depth="append", seed=3)
    plain = model.clone(scan=False)
    initial = train_state.init_params(plain, (32, 32, 3), 3)["Transformer"]
    for i in range(5):
        new = flax.traverse_util.flatten_dict(initial[f"encoderblock_{i}"], sep="/")
        expected = theirs(i) if i < 2 else new  # initialised by another program: not to the bit
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), block(params, i), expected
        )
    with pytest.raises(UserError, match="it can be 'stack', 'append'"):
        pretrained.load(path, model, depth="double")
    with pytest.raises(UserError, match="encoderblock_1/.* there, missing here"):
        pretrained.load(path, tiny_model(depth=1), depth="stack")


def test_grids_that_are_no_square(weights_file):
    model = tiny_model()
    images = np.zeros((1, 16, 48, 3), np.float32)
    ours = flax.traverse_util.flatten_dict(
        randomized(model.init(jax.random.key(0), images)["params"]), sep="/"
    )
    path = weights_file(ours)
    with pytest.raises(UserError, match="12 positions are, and there are no square ones"):
        pretrained.load(path, model, (32, 32))
    with pytest.raises(UserError, match=r"no grid of \(3, 5\)"):
        pretrained.load(path, model, (32, 32), grid=(3, 5))
    kept = pretrained.load(path, model, (16, 48))
    np.testing.assert_array_equal(position_table(kept), ours[pretrained.POSEMB])
    resized = pretrained.load(path, model, (32, 32), grid=(2, 6))
    expected = resize.resize_positions(ours[pretrained.POSEMB], (2, 6), (4, 4), True)
    np.testing.assert_array_equal(position_table(resized), expected)
    # 16 positions may be 4 x 4 or 2 x 8.
    path = weights_file(flat_params(model))
    with pytest.raises(UserError, match="there are 2x8 and 4x4"):
        pretrained.load(path, model, (16, 64))
    pretrained.load(path, model, (16, 64), grid=(4, 4))


def position_table(params):
    return params["Transformer"]["posembed_input"]["pos_embedding"]


def test_a_fixed_table_and_a_learned_one(weights_file):
    """A file may hold the table that the model computes; another one is refused."""
    fixed, learned = tiny_model(posemb="sincos2d"), tiny_model()
    ours = flat_params(learned)
    table = posemb.table("sincos2d", 4, 4, 32, True)
    path = weights_file(ours | {pretrained.POSEMB: table})
    params = pretrained.load(path, fixed)
    assert "posembed_input" not in params["Transformer"]
    images = np.random.default_rng(0).normal(size=(1, 32, 32, 3))
    np.testing.assert_allclose(
        fixed.apply({"params": params}, images),
        learned.apply({"params": pretrained.load(path, learned)}, images),
        atol=1e-6,
    )
    with pytest.raises(UserError, match="posemb 'learned'"):
        pretrained.load(weights_file(ours), fixed)
