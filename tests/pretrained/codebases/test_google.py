"""Names and shapes in the files of Google's code and big_vision, of all ages."""

import numpy as np
import pytest
from conftest import tiny_model
from published import (
    assert_loads,
    assert_same,
    flat_params,
    flatten,
    random_params,
)

from vit_jax import pretrained
from vit_jax.errors import UserError
from vit_jax.paths import POSEMB, stack_blocks


@pytest.mark.parametrize("prefix", ["", "params/", "opt/target/"])
@pytest.mark.parametrize("numbering", ["old", "new"])
def test_flax_files_of_all_ages(prefix, numbering, weights_file):
    model = tiny_model(representation_size=16)
    params = flat_params(model)
    stored = dict(params)
    if numbering == "old":
        old = {"LayerNorm_1": "LayerNorm_2", "MlpBlock_0": "MlpBlock_3"}
        old["MultiHeadDotProductAttention_0"] = "MultiHeadDotProductAttention_1"
        for new, name in old.items():
            stored = {key.replace(new, name): value for key, value in stored.items()}
    stored = {prefix + name: value for name, value in stored.items()}
    if prefix:  # what a training state has beside the parameters
        stored |= {f"opt/state/{name}": np.zeros(1) for name in params}
        stored |= {"extra/step": np.zeros(())}
    assert_loads(weights_file(stored), model, params)


@pytest.mark.parametrize("has_module", [False, True])
def test_big_vision_with_map_head_stacked_blocks_and_positions_at_the_top(has_module, weights_file):
    model = tiny_model(pool="map", scan=True)
    params = flat_params(model)
    stored = dict(params)
    stored["pos_embedding"] = stored.pop(POSEMB)
    if not has_module:
        stored = {name.replace("MAPHead_0/", "", 1): v for name, v in stored.items()}
    assert_loads(weights_file(stored), model, params)


def test_stacked_and_unstacked_blocks_load_into_either_model(weights_file):
    unstacked_model, stacked_model = tiny_model(), tiny_model(scan=True)
    params = random_params(unstacked_model)
    unstacked, stacked = flatten(params), flatten(stack_blocks(params))
    for stored in (unstacked, stacked):
        path = weights_file(stored)
        assert_loads(path, unstacked_model, unstacked)
        assert_loads(path, stacked_model, stacked)


def test_positions_at_the_top_with_a_row_for_the_class_token(weights_file):
    params = flat_params(tiny_model())
    stored = dict(params)
    stored["pos_embedding"] = stored.pop(POSEMB)
    path = weights_file(stored)
    with pytest.raises(UserError, match="has 17 positions .*, which is no square: give grid="):
        pretrained.load(path, tiny_model(), (32, 32))
    assert_same(flatten(pretrained.load(path, tiny_model(), (32, 32), grid=(4, 4))), params)


def test_big_vision_positions_that_are_no_square(weights_file):
    model = tiny_model()
    params = flat_params(model, (32, 64))
    params[POSEMB][:, 0] = 0.0
    stored = {name: value for name, value in params.items() if name != POSEMB}
    path = weights_file(stored | {"pos_embedding": params[POSEMB][:, 1:]})
    assert_same(flatten(pretrained.load(path, model, (32, 64))), params)
    assert_same(flatten(pretrained.load(path, model, grid=(4, 8))), params)
