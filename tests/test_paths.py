"""The names of parameters, numbered and stacked, alone and inside an optimizer's state."""

import jax
import jax.numpy as jnp
import pytest
from conftest import tiny_model

from vit_jax import paths


def names(**fields):
    model = tiny_model(**fields)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3))))
    return [paths.path_name(path) for path, _ in jax.tree.leaves_with_path(shapes["params"])]


# Every optional parameter is in the model of one row at least.
MODELS = (
    dict(representation_size=16),
    dict(pool="map", posemb="none"),
    dict(pool="gap", norm="post"),
    dict(resnet=dict(num_layers=(1, 1), width_factor=0.5), patch_size=1),
    dict(init_values=0.1, qk_norm=True, pre_norm=True, reg_tokens=2, rope="mixed"),
    dict(mlp_layer="swiglu", scale_mlp=True),
)


@pytest.mark.parametrize("fields", MODELS)
def test_every_parameter_is_known(fields):
    found = names(**fields)
    assert all(map(paths.is_known, found))
    assert paths.num_blocks(found) == 2


def test_the_table_lists_every_parameter_of_a_block():
    found = [name for fields in MODELS for name in names(**fields)]
    assert set(filter(None, map(paths.block_parameter, found))) == set(paths.BLOCK_PARAMETERS)


def test_unknown_parameters():
    for name in (
        "Transformer/encoderblock_0/MlpBlock_0/NoSuchLayer_2/kernel",
        "Transformer/encoderblock_0/NoSuchModule_0/scale",
        "no_such_token",
        "MAPHead_0/query",
    ):
        assert not paths.is_known(name)


def test_blocks():
    stacked, numbered = names(scan=True), names()
    in_first_block = sum(paths.block_index(name) == 0 for name in numbered)
    assert sum(map(paths.is_stacked, stacked)) == in_first_block
    name = "opt_state/1/0/mu/Transformer/encoderblock_11/MlpBlock_0/Dense_0/kernel"
    assert paths.block_index(name) == 11
    assert paths.block_parameter(name) == f"{paths.MLP_IN}/kernel"
    assert paths.block_index("MAPHead_0/LayerNorm_0/scale") is None
    assert paths.block_parameter("MAPHead_0/probe") is None


def test_input_layers():
    found = names(resnet=dict(num_layers=(1,), width_factor=0.5), patch_size=1)
    inputs = [name for name in found if paths.is_input_layer(name)]
    assert {name.split("/")[0] for name in inputs} == {
        "Transformer",
        "block1",
        "cls",
        "conv_root",
        "embedding",
        "gn_root",
    }
    assert [name for name in inputs if name.startswith("Transformer")] == [paths.POSEMB]
