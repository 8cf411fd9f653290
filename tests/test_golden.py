"""Training runs of published implementations (tests/golden, see its README), step by step.

Logits of published models are compared in tests/pretrained.
"""

import flax
import jax
import numpy as np
import pytest
from conftest import GOLDEN, tiny_model

from vit_jax.training import augment, optim, steps, train_state

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
    # The reference stores normalized images.
    monkeypatch.setattr(augment, "normalize", lambda images, *_: images)
    tx, learning_rate = optim.create(config, tree("init/"), config.total_steps)
    make_state, _ = train_state.initializer(model, tx, (32, 32, 3), config, one_device)
    step = jax.jit(steps.make_train_step(model, tx, learning_rate, config))

    state, losses = make_state(), []
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
