"""Published files: names, layouts, resolutions, and what can be wrong with them."""

import json
import shutil
import sys
import types
import zipfile

import flax
import jax
import ml_dtypes
import numpy as np
import pytest
from conftest import GOLDEN, randomized, tiny_model
from safetensors.numpy import load_file, save_file

import train
from configs import digits, vit_r50_b16
from vit_jax import architecture, checkpoint, models, pretrained, resize, train_state, weights
from vit_jax.errors import UserError
from vit_jax.models import posemb
from vit_jax.models.scan import stack_blocks, unstack_blocks

CASES = {case["name"]: case for case in json.loads((GOLDEN / "index.json").read_text())}


def golden_model(case, **fields):
    names = ("patch_size", "width", "depth", "num_heads", "mlp_dim", "pool", "num_classes")
    names += ("representation_size", "gelu", "layer_norm_eps", "scan")
    fields = {name: case[name] for name in names if name in case} | fields
    if case.get("posemb") == "sincos2d":
        fields["posemb"] = "sincos2d"
    if case.get("resnet") is not None:
        fields["resnet"] = dict(num_layers=tuple(case["resnet"]), width_factor=1)
    if case["name"] == "timm_avg_fcnorm":
        fields.setdefault("pool_norm", "after")
    return models.create("Ti/16", **fields)


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


def flat_params(model, size=32):
    params = model.init(jax.random.key(0), np.zeros((1, size, size, 3), np.float32))["params"]
    return flax.traverse_util.flatten_dict(randomized(params), sep="/")


def assert_loads(path, model, expected):
    params = pretrained.load(path, model, (32, 32))
    jax.tree.map(
        np.testing.assert_array_equal, params, flax.traverse_util.unflatten_dict(expected, sep="/")
    )


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
    config.update(total_steps=300, eval_every_steps=0, checkpoint_every_steps=0, best_metric="")
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
    config.init_from = str(tmp_path / "small" / "checkpoints" / "300")
    model = models.from_config(checkpoint.read_config(tmp_path / "small"))
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


def test_fields_that_a_file_implies(tmp_path):
    """A model with other ones is refused, with the override that would mend it."""
    case = CASES["hf_vit"]
    shutil.copytree(GOLDEN / case["weights"], tmp_path / "hf")
    for fields, override in (
        (dict(gelu="tanh"), "--config.model.gelu=exact"),
        (dict(layer_norm_eps=1e-6), "--config.model.layer_norm_eps=1e-12"),
    ):
        with pytest.raises(UserError, match=override):
            pretrained.load(tmp_path / "hf", golden_model(case, **fields))
    case = CASES["timm_avg_fcnorm"]
    with pytest.raises(UserError, match="--config.model.pool_norm=after"):
        pretrained.load(GOLDEN / case["weights"], golden_model(case, pool_norm="before"))


def golden_flat(name):
    path = GOLDEN / CASES[name]["weights"]
    return load_file(path / "model.safetensors" if path.is_dir() else path)


NEW_NAMES = {
    "encoder.layer": "layers",
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}


@pytest.mark.parametrize("names", ["old", "new"])
@pytest.mark.parametrize("prefix", ["vit.", ""])
def test_transformers_naming_schemes_and_the_bare_model(names, prefix, tmp_path):
    """ViTModel has no head, but a pooler: our representation layer."""
    model = golden_model(CASES["hf_vit"])
    expected = pretrained.load(GOLDEN / "hf_vit.hf", model)
    flat = {name.replace("vit.", prefix, 1): v for name, v in golden_flat("hf_vit").items()}
    if names == "new":
        for old, new in NEW_NAMES.items():
            flat = {name.replace(old, new): value for name, value in flat.items()}
        assert f"{prefix}layers.1.mlp.fc2.bias" in flat
        assert f"{prefix}layers.1.attention.o_proj.bias" in flat
    save_file(flat, tmp_path / "w.safetensors")
    loaded = pretrained.load(tmp_path / "w.safetensors", model)
    jax.tree.map(np.testing.assert_array_equal, loaded, expected)

    flat = {name: value for name, value in flat.items() if "classifier" not in name}
    rng = np.random.default_rng(0)
    pooler = {"weight": rng.normal(size=(32, 32)), "bias": rng.normal(size=32)}
    flat |= {f"{prefix}pooler.dense.{n}": v.astype(np.float32) for n, v in pooler.items()}
    flat[f"{prefix}embeddings.mask_token"] = np.zeros((1, 1, 32), np.float32)
    save_file(flat, tmp_path / "w.safetensors")
    bare = model.clone(num_classes=None, representation_size=32)
    images = np.load(GOLDEN / CASES["hf_vit"]["expected"])["images"]
    params = pretrained.load(tmp_path / "w.safetensors", bare)
    tokens = model.clone(num_classes=None).apply({"params": expected}, images)
    np.testing.assert_allclose(
        bare.apply({"params": params}, images),
        np.tanh(tokens @ pooler["weight"].T + pooler["bias"]),
        atol=1e-5,
    )


def test_timm_with_separate_projections_and_half_precision(tmp_path):
    flat = golden_flat("timm_token")
    for name in [name for name in flat if ".qkv." in name]:
        for part, rows in zip("qkv", np.split(flat[name], 3), strict=True):
            flat[name.replace("qkv", f"{part}_proj")] = rows
        del flat[name]
    save_file(flat, tmp_path / "w.safetensors")
    model = golden_model(CASES["timm_token"])
    expected = pretrained.load(GOLDEN / CASES["timm_token"]["weights"], model)
    loaded = pretrained.load(tmp_path / "w.safetensors", model)
    jax.tree.map(np.testing.assert_array_equal, loaded, expected)

    for dtype in (np.float16, ml_dtypes.bfloat16):
        save_file({n: v.astype(dtype) for n, v in flat.items()}, tmp_path / "w.safetensors")
        loaded = pretrained.load(tmp_path / "w.safetensors", model)
        rounded = jax.tree.map(lambda leaf, d=dtype: leaf.astype(d).astype(np.float32), expected)
        jax.tree.map(np.testing.assert_array_equal, loaded, rounded)


def test_timm_without_a_position_for_the_class_token(tmp_path):
    flat = golden_flat("timm_token")
    positions = flat["pos_embed"]
    flat["pos_embed"] = positions[:, 1:].copy()
    save_file(flat, tmp_path / "w.safetensors")
    model = golden_model(CASES["timm_token"])
    loaded = pretrained.load(tmp_path / "w.safetensors", model)
    table = loaded["Transformer"]["posembed_input"]["pos_embedding"]
    np.testing.assert_array_equal(table[:, 1:], positions[:, 1:])
    assert not table[:, 0].any()


def test_what_a_config_beside_the_weights_settles(tmp_path):
    """timm's and transformers' arguments: heads, GELU, epsilon, normalisation."""
    case = CASES["timm_token"]
    (tmp_path / "timm").mkdir()
    shutil.copy(GOLDEN / case["weights"], tmp_path / "timm" / "model.safetensors")
    config = {"architecture": "vit_base_patch16_224", "model_args": {"act_layer": "gelu_tanh"}}
    config["model_args"]["num_heads"] = 8
    config["pretrained_cfg"] = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    (tmp_path / "timm" / "config.json").write_text(json.dumps(config))
    model = golden_model(case)
    with pytest.raises(UserError, match="model.gelu=tanh --config.model.num_heads=8") as raised:
        pretrained.load(tmp_path / "timm", model)
    assert "with model.gelu 'tanh', model.num_heads 8, and here are 'exact', 4" in str(raised.value)
    model = model.clone(gelu="tanh", num_heads=8)
    pretrained.load(tmp_path / "timm", model, mean=(0.485, 0.456, 0.406))
    with pytest.raises(UserError, match=r'mean="\(0.485, 0.456, 0.406\)" --config.augment.std='):
        pretrained.load(tmp_path / "timm", model, mean=(0.5,), std=(0.5,))

    shutil.copytree(GOLDEN / "hf_vit.hf", tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    for changes, match in (
        (dict(hidden_act="gelu_new"), "gelu=tanh"),
        (dict(num_attention_heads=2), "num_heads=2"),
        (dict(hidden_act="relu"), "the activation 'relu'"),
    ):
        (tmp_path / "hf" / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(UserError, match=match):
            pretrained.load(tmp_path / "hf", golden_model(CASES["hf_vit"]))
    (tmp_path / "hf" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json is damaged"):
        pretrained.load(tmp_path / "hf", golden_model(CASES["hf_vit"]))


@pytest.fixture
def weights_file(tmp_path):
    """Writes flat parameters as an .npz."""

    def write(flat):
        np.savez(tmp_path / "w.npz", **flat)
        return tmp_path / "w.npz"

    return write


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


def test_hf_names_are_fetched(tmp_path, monkeypatch):
    model = golden_model(CASES["hf_vit"])
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "huggingface_hub", None)  # as where it isn't installed
        with pytest.raises(UserError, match="hf:google/vit is fetched with huggingface_hub: pip"):
            pretrained.load("hf:google/vit", model)
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, "model*.safetensors*" in allow_patterns))
        if name == "nobody/nothing":
            raise OSError("404\nthe page isn't there")
        return str(GOLDEN / "hf_vit.hf")

    hub = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    jax.tree.map(
        np.testing.assert_array_equal,
        pretrained.load("hf:google/vit", model),
        pretrained.load(GOLDEN / "hf_vit.hf", model),
    )
    assert asked == [("google/vit", True)]
    with pytest.raises(UserError, match="hf:nobody/nothing can't be fetched: 404$"):
        pretrained.load("hf:nobody/nothing", model)


def test_what_another_file_looks_like(tmp_path, weights_file):
    def message(flat, model=None):
        path = weights_file(flat) if model else tmp_path / "w.safetensors"
        if model is None:
            save_file(flat, path)
        with pytest.raises(UserError) as raised:
            pretrained.load(path, model or golden_model(CASES["timm_token"]))
        return str(raised.value)

    timm, hf = golden_flat("timm_token"), golden_flat("hf_vit")
    one = np.zeros(1, np.float32)
    for flat, names, what in (
        (timm, ["dist_token", "head_dist.weight"], "a distilled DeiT"),
        (timm, ["blocks.0.ls1.gamma"], "a Vision Transformer with LayerScale"),
        (timm, ["reg_token"], "a Vision Transformer with register tokens"),
        (timm, ["norm_pre.weight"], "a Vision Transformer with a norm before its blocks"),
        (timm, ["blocks.0.gamma_1"], "a BEiT"),
        (hf, ["vit.encoder.layer.0.layer_scale1.lambda1"], "a Vision Transformer with LayerScale"),
        (hf, ["decoder.decoder_layers.0.output.dense.weight"], "a masked autoencoder"),
        ({}, ["layer1.0.conv1.weight", "bn1.running_mean"], "a convolutional network"),
        ({}, ["layers.0.blocks.0.attn.relative_position_bias_table"], "a Swin Transformer"),
        ({}, ["text_model.embeddings"], "an image-and-text model"),
        ({}, ["something.else"], "its parameters are something.else"),
    ):
        assert what in message(flat | dict.fromkeys(names, one))
    mixer = {"MixerBlock_0/token_mixing/Dense_0/kernel": one}
    assert "an MLP-Mixer" in message(mixer, tiny_model())
    text = message(flat_params(tiny_model(pool="map", num_classes=3)), models.create("B/16"))
    assert "has model.pool" not in text
    assert "it looks like a ViT of width 32, depth 2" in text
    assert "the model here is ViT-B/16; it has patch_size 8, width 32, depth 2" in text
    assert "pool 'map'" in text
    assert "MAPHead_0/probe (1, 1, 32) there, missing here" in text
    assert "encoderblock_{2,3,4,5,6,7,8,9,10,11}/LayerNorm_0/bias missing there" in text


def test_models_of_timm_that_there_are_not(tmp_path):
    flat = golden_flat("timm_avg_fcnorm")
    model = golden_model(CASES["timm_avg_fcnorm"])

    def load(flat, model=model, **config):
        (tmp_path / "m").mkdir(exist_ok=True)
        save_file(flat, tmp_path / "m" / "model.safetensors")
        (tmp_path / "m" / "config.json").write_text(json.dumps(config))
        return pretrained.load(tmp_path / "m", model, (32, 32))

    load(flat, global_pool="avg")
    with pytest.raises(UserError, match="pools by 'max': there's none here"):
        load(flat, global_pool="avg", model_args={"global_pool": "max"})
    token = golden_flat("timm_token")
    with pytest.raises(UserError, match="pools by 'avg' beside a class token"):
        load(token, global_pool="avg")
    without = {name: value for name, value in flat.items() if name != "pos_embed"}
    with pytest.raises(UserError, match="--config.model.posemb=none"):
        load(without)
    params = load(without, model.clone(posemb="none"))
    assert "posembed_input" not in params["Transformer"]
    siglip = {"architecture": "vit_so400m_patch16_siglip_gap_256"}  # its config tells no GELU
    with pytest.raises(UserError, match="--config.model.gelu=tanh"):
        load(flat, **siglip)


def test_what_googles_files_always_mean(weights_file):
    path = weights_file(flat_params(tiny_model()))
    with pytest.raises(UserError, match="gelu=tanh --config.model.layer_norm_eps=1e-06"):
        pretrained.load(path, tiny_model(gelu="exact", layer_norm_eps=1e-12))
    with pytest.raises(UserError, match="augment.mean="):
        pretrained.load(path, tiny_model(), mean=(0.485, 0.456, 0.406))


def test_npz_files_of_other_kinds(tmp_path, weights_file):
    ours = flat_params(tiny_model())
    half = {name: value.astype(ml_dtypes.bfloat16) for name, value in ours.items()}
    rounded = {name: value.astype(np.float32) for name, value in half.items()}
    assert_loads(weights_file(half), tiny_model(), rounded)
    beside = {f"opt/target/{name}": value for name, value in ours.items()}
    beside |= {f"opt/state/{name}": value for name, value in ours.items()}
    assert_loads(weights_file(beside | {"extra/step": np.zeros(())}), tiny_model(), ours)
    combined = dict(ours)
    combined["pos_embedding"] = combined.pop(pretrained.POSEMB)  # with the class token's row
    assert_loads(weights_file(combined), tiny_model(), ours)

    with zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w") as file:
        file.writestr("archive/data.pkl", b"\x80\x02}q\x00.")
    with pytest.raises(UserError, match="a PyTorch pickle isn't read; save it as .safetensors"):
        pretrained.load(tmp_path / "pytorch_model.bin", tiny_model())
    np.savez_compressed(tmp_path / "w.npz", **ours)
    content = bytearray((tmp_path / "w.npz").read_bytes())
    content[400:500] = bytes(100)
    (tmp_path / "w.npz").write_bytes(content)
    with pytest.raises(UserError, match="w.npz is damaged"):
        pretrained.load(tmp_path / "w.npz", tiny_model())


def test_folders_of_other_kinds(tmp_path):
    model = golden_model(CASES["hf_vit"])
    folder = shutil.copytree(GOLDEN / "hf_vit.hf", tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    for text, match in (
        ("[1]", "holds a list, not an object"),
        (json.dumps(config | {"image_size": "224"}), "the image_size beside it is '224'"),
        (json.dumps(config | {"layer_norm_eps": "1e-12"}), "the layer_norm_eps beside it"),
        (json.dumps(config | {"id2label": ["a"]}), "the id2label beside it"),
        (json.dumps(config | {"model_type": "deit", "architectures": ["DeiTModel"]}), "DeiTModel"),
    ):
        (folder / "config.json").write_text(text)
        with pytest.raises(UserError, match=match):
            pretrained.load(folder, model)
    gaps = {"id2label": {"0": "a", "2": "c"}}
    (folder / "config.json").write_text(json.dumps(config | gaps))
    processor = {"do_center_crop": True, "crop_size": 224, "size": {"shortest_edge": 256}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    found = weights.read(folder)
    assert found.class_names == ("a", "class 1", "c")
    assert found.keep == 0.875
    expected = pretrained.load(folder, model)

    flat = load_file(folder / "model.safetensors")  # in two shards
    names, files = sorted(flat), ("model-00001-of-2.safetensors", "model-00002-of-2.safetensors")
    for file, part in zip(files, (names[:9], names[9:]), strict=True):
        save_file({name: flat[name] for name in part}, folder / file)
    index = {"weight_map": {name: files[i >= 9] for i, name in enumerate(names)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    jax.tree.map(np.testing.assert_array_equal, pretrained.load(folder, model), expected)
    (folder / files[0]).unlink()
    with pytest.raises(UserError, match=f"lacks {files[0]}"):
        pretrained.load(folder, model)
    (folder / "model.safetensors.index.json").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="found a pytorch_model.bin, a pickle, which isn't read"):
        pretrained.load(folder, model)


@pytest.mark.parametrize("variant", ["Ti/16", "S/32", "R+Ti/16", "R26+S/32", "R50+B/16"])
def test_the_architecture_is_told_from_the_shapes(variant):
    model = models.create(variant)
    shapes = architecture.parameters(model, (224, 224, 3))
    found = architecture.fields(shapes)
    assert architecture.describe(found) == f"ViT-{variant}"
    assert found == {name: value for name, value in model.__dict__.items() if name in found}
