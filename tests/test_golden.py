"""The numbers that published implementations compute (tests/golden, see its README)."""

import json
import re

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN, tiny_model

from vit_jax import models, optim, train_state

CASES = {case["name"]: case for case in json.loads((GOLDEN / "index.json").read_text())}
LAYERS = {"LayerNorm_2": "LayerNorm_1", "MlpBlock_3": "MlpBlock_0"}
LAYERS["MultiHeadDotProductAttention_1"] = "MultiHeadDotProductAttention_0"


def load(name):
    """A case's parameters under our names."""
    with np.load(GOLDEN / f"{name}.weights.npz", allow_pickle=False) as file:
        flat = {key.removeprefix("params/"): file[key] for key in file.files}
    if name.startswith("google"):  # the numbering of Flax before Linen
        flat = {
            re.sub("|".join(LAYERS), lambda match: LAYERS[match[0]], key): value
            for key, value in flat.items()
        }
        # Group norms come as (1, 1, 1, C).
        flat = {k: v.reshape(-1) if re.search(r"gn\w+/", k) else v for k, v in flat.items()}
    if "pos_embedding" in flat:  # big_vision's has no row for the class token
        posemb = flat.pop("pos_embedding")
        if "cls" in flat:
            posemb = np.pad(posemb, ((0, 0), (1, 0), (0, 0)))
        flat["Transformer/posembed_input/pos_embedding"] = posemb
    return flax.traverse_util.unflatten_dict(flat, sep="/")


@pytest.mark.parametrize(
    "name",
    [
        "google_token",
        "google_token_prelogits",
        "google_gap",
        "google_hybrid",
        "google_hybrid_stem_only",
        "bigvision_tok",
        "bigvision_gap_sincos",
        "bigvision_map_scan",
    ],
)
def test_logits_of_published_implementations(name):
    case = CASES[name]
    fields = ("patch_size", "width", "depth", "num_heads", "mlp_dim", "pool", "num_classes")
    fields += ("representation_size", "gelu", "layer_norm_eps")
    stem = case.get("resnet")
    model = models.create(
        "Ti/16",
        **{field: case[field] for field in fields},
        posemb="sincos2d" if case.get("posemb") == "sincos2d" else "learned",
        scan=case.get("scan", False),
        resnet=None if stem is None else dict(num_layers=tuple(stem), width_factor=1),
    )
    params = load(name)
    expected = np.load(GOLDEN / f"{name}.expected.npz", allow_pickle=False)
    images = jnp.asarray(expected["images"])
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images))["params"]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda leaf: leaf.shape, shapes)
    logits = model.apply({"params": params}, images, train=False)
    tolerance = 1e-5 if stem is None else 2e-5
    np.testing.assert_allclose(logits, expected["logits"], atol=tolerance, rtol=tolerance)


# The recipes of tests/golden/README.md.
RECIPES = {
    "sgd": dict(
        optimizer=dict(name="sgd", momentum=0.9, momentum_dtype="bfloat16", weight_decay=0.0),
        schedule=dict(base_lr=0.03, warmup_steps=5),
        loss="softmax",
    ),
    "adam": dict(
        optimizer=dict(name="adamw", mu_dtype="bfloat16", weight_decay=0.1),
        schedule=dict(base_lr=1e-3, warmup_steps=6),
        loss="sigmoid",
    ),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_training_follows_the_reference_run(recipe, tiny_config, one_device, monkeypatch):
    config = tiny_config
    config.update(RECIPES[recipe])
    reference = np.load(GOLDEN / "trajectories.npz", allow_pickle=False)

    def tree(prefix):
        flat = {
            key.removeprefix(prefix): reference[key]
            for key in reference.files
            if key.startswith(prefix)
        }
        return flax.traverse_util.unflatten_dict(flat, sep="/")

    model = tiny_model()
    monkeypatch.setattr(train_state, "init_params", lambda *_: tree("init/"))
    # The reference's images are floats already.
    monkeypatch.setattr(train_state.augment, "normalize", lambda images, *_: images)
    tx, learning_rate = optim.create(config, tree("init/"), config.total_steps)
    init, _ = train_state.initializer(model, tx, (32, 32, 3), config, one_device)
    step = jax.jit(train_state.make_train_step(model, tx, learning_rate, config))

    state, losses = init(), []
    for images, labels in zip(reference["images"], reference["labels"], strict=True):
        state, values = step(state, {"images": images, "labels": labels})
        losses.append(float(values["loss"]))
    np.testing.assert_allclose(losses, reference[f"{recipe}_losses"], rtol=1e-4)
    expected = tree(f"{recipe}/")
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(ours, theirs, atol=1e-3, rtol=1e-3),
        state.params,
        expected,
    )
