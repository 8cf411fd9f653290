"""Fields of a model inferred from the shapes of its parameters."""

import pytest

from vit_jax import models
from vit_jax.pretrained import architecture


@pytest.mark.parametrize(
    "variant",
    ["S/32", "R+Ti/16", "R26+S/32", pytest.param("R50+B/16", marks=pytest.mark.slow)],
)
def test_fields_are_inferred_from_shapes(variant):
    model = models.create(variant)
    fields = architecture.infer_fields(architecture.param_shapes(model, (64, 64, 3)))
    assert architecture.describe(fields) == f"ViT-{variant}"
    assert fields == {name: value for name, value in model.__dict__.items() if name in fields}
