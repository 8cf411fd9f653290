"""Attention rollout."""

import numpy as np
import pytest

from vit_jax.inference.rollout import attention_rollout


@pytest.mark.parametrize("has_class_token", [True, False])
def test_rollout_is_the_product_of_the_blocks(has_class_token):
    """Compares with the definition, block by block in float64."""
    rng = np.random.default_rng(0)
    attention = rng.random((3, 2, 4, 10, 10))  # (depth, N, H, L, L)
    attention /= attention.sum(axis=-1, keepdims=True)
    shares = attention_rollout(attention.astype(np.float32), has_class_token)
    for n in range(2):
        product = np.eye(10)
        for block in attention[:, n]:
            product = (0.5 * block.mean(axis=0) + 0.5 * np.eye(10)) @ product
        row = product[0, 1:] if has_class_token else product.mean(axis=0)
        np.testing.assert_allclose(shares[n], row / row.sum(), atol=1e-6)


def test_patch_that_all_tokens_attend_to_has_the_largest_share():
    attention = np.full((2, 1, 1, 5, 5), 0.0, np.float32)
    attention[..., 3] = 1.0
    shares = np.asarray(attention_rollout(attention, True))[0]
    assert shares.argmax() == 2  # the class token's place is removed
    assert shares[2] > 0.9
