import pytest

from vit_jax import models
from vit_jax.pretrained import architecture


@pytest.mark.parametrize("variant", ["Ti/16", "S/32", "R+Ti/16", "R26+S/32", "R50+B/16"])
def test_the_architecture_is_told_from_the_shapes(variant):
    model = models.create(variant)
    shapes = architecture.parameters(model, (224, 224, 3))
    found = architecture.fields(shapes)
    assert architecture.describe(found) == f"ViT-{variant}"
    assert found == {name: value for name, value in model.__dict__.items() if name in found}
