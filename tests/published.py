"""Weights of published codebases in tests/golden, and weights of random models."""

import json

import flax
import jax
import numpy as np
from conftest import GOLDEN, apply, randomized, tiny_model
from orbax.checkpoint import StandardCheckpointer
from safetensors.numpy import load_file

from vit_jax import models, pretrained
from vit_jax.runs import run_folder

CASES = {case["name"]: case for case in json.loads((GOLDEN / "index.json").read_text())}

# The Vision Transformers that people use today.
MODERN = GOLDEN / "modern"
MODERN_CASES = {case["name"]: case for case in json.loads((MODERN / "index.json").read_text())}
# Those that can't be written again in their own format -> what it doesn't have.
REFUSED = {
    **dict.fromkeys(
        ("timm_rope_axial", "timm_rope_ape", "timm_rope_reg1_gap", "timm_eva02"), "rope 'axial'"
    ),
    "timm_eva02_packed": "rope 'axial'",
    "timm_rope_mixed": "rope 'mixed'",
    "timm_dinov3": "mlp_layer 'swiglu' and layer_norm_eps 1e-05",
    "timm_rmsnorm": "norm_layer 'rmsnorm'",
    "hf_mae": "pool 'none'",
}
SAVED = [name for name in MODERN_CASES if name not in REFUSED]
TOKENS = ("tokens", "last_hidden_state")  # what timm and transformers call all tokens


def load_expected(name, prefix=""):
    """Returns the images of a case of MODERN_CASES and its source's outputs, by their names.

    Args:
        prefix: "hires_": those of images of another size, {} if there are none.
    """
    with np.load(MODERN / MODERN_CASES[name]["expected"], allow_pickle=False) as stored:
        names = [n for n in stored.files if n.startswith("hires_") == bool(prefix)]
        return {n.removeprefix(prefix): stored[n] for n in names}


def assert_computes(model, params, images, expected):
    """Asserts that a model computes the outputs of timm or transformers, by their names."""
    outputs, captured = apply(model, {"params": params}, images, capture=("tokens",))
    for name, value in expected.items():
        ours = captured["tokens"] if name in TOKENS else outputs
        np.testing.assert_allclose(ours, value, atol=1e-5, rtol=1e-5, err_msg=name)
    if model.pool == "none":
        np.testing.assert_array_equal(outputs, captured["tokens"])


def save_again(name, folder):
    """Opens a case of MODERN_CASES, and saves it in its own format; returns (model, params)."""
    source = MODERN / MODERN_CASES[name]["weights"]
    model, params = pretrained.open(source)
    size = MODERN_CASES[name]["image_size"]
    pretrained.save(params, folder, source.suffix[1:], model=model, image_size=size)
    return model, params


def golden_model(case, **fields):
    """Returns the model of an entry of tests/golden/index.json, with other fields on request."""
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


def golden_tensors(name):
    """Returns the state dict of one of timm's or transformers' golden files."""
    path = GOLDEN / CASES[name]["weights"]
    return load_file(path / "model.safetensors" if path.is_dir() else path)


def random_params(model, size=(32, 32), channels=3, seed=0):
    """Returns random parameters of a model for images of a size; compiles nothing."""
    images = np.zeros((1, *size, channels), np.float32)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images))
    return randomized(shapes["params"], seed)


def random_model(size=(32, 32), **fields):
    """Returns a tiny model with random parameters, and two images for it."""
    model = tiny_model(**fields)
    images = np.random.default_rng(1).normal(size=(2, *size, 3)).astype(np.float32)
    return model, random_params(model, size), images


def compute_logits(model, params, images):
    """Returns `model.apply`, compiled as a whole: faster than compiling each operation."""
    return jax.jit(lambda params, images: model.apply({"params": params}, images))(params, images)


def flat_params(model, size=(32, 32)):
    """Returns random parameters by name."""
    return flatten(random_params(model, size))


def flatten(params):
    return flax.traverse_util.flatten_dict(params, sep="/")


def assert_same(params, expected):
    """Asserts that two trees of parameters are the same to the bit."""
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def assert_loads(path, model, expected):
    """Asserts that a file holds these parameters, given by name."""
    params = pretrained.load(path, model, (32, 32))
    assert_same(params, flax.traverse_util.unflatten_dict(expected, sep="/"))


def write_run(workdir, config, class_names=None, **items):
    """Writes the folder of a run with one checkpoint, of step 60, without training.

    Args:
        workdir: the run's folder.
        config: its configuration, with num_classes.
        class_names: its class names.
        **items: params, and ema_params if config.ema_decay is set.
    """
    (workdir / "checkpoints" / "60").mkdir(parents=True)
    run_folder.write_config(workdir, config)
    if class_names:
        run_folder.write_class_names(workdir, class_names)
    with StandardCheckpointer() as checkpointer:
        for name, tree in items.items():
            checkpointer.save(workdir.resolve() / "checkpoints" / "60" / name, tree)
    return workdir
