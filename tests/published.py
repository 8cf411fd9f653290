"""Files of published codebases in tests/golden, and the models they are of."""

import json

import flax
import jax
import numpy as np
from conftest import GOLDEN, randomized
from safetensors.numpy import load_file

from vit_jax import models, pretrained

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


def golden_flat(name):
    path = GOLDEN / CASES[name]["weights"]
    return load_file(path / "model.safetensors" if path.is_dir() else path)


def flat_params(model, size=32):
    params = model.init(jax.random.key(0), np.zeros((1, size, size, 3), np.float32))["params"]
    return flax.traverse_util.flatten_dict(randomized(params), sep="/")


def assert_loads(path, model, expected):
    params = pretrained.load(path, model, (32, 32))
    jax.tree.map(
        np.testing.assert_array_equal, params, flax.traverse_util.unflatten_dict(expected, sep="/")
    )
