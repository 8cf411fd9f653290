"""A run's configuration: what it refuses, and what it fills in from the dataset."""

import types

import pytest
from whole_runs import quick_config

import configuration
from vit_jax.errors import UserError


def training_split(**fields):
    """A split of ten classes."""
    split = dict(name="photos", num_examples=640, fingerprint="f", order="global", num_classes=10)
    return types.SimpleNamespace(**{**split, "class_names": tuple("0123456789"), **fields})


def test_what_the_dataset_determines_is_filled_in():
    config = quick_config(batch_size=64)
    config.total_steps, config.num_epochs = None, 3
    resolved = configuration.resolve(config, training_split())
    assert (resolved.num_classes, resolved.total_steps) == (10, 30)
    assert (resolved.dataset.num_examples, resolved.dataset.fingerprint) == (640, "f")
    assert configuration.resolve(resolved, training_split()) == resolved
    assert config.num_classes is None  # the one that was given doesn't change


def test_values_that_the_dataset_contradicts_are_named():
    with pytest.raises(UserError, match="config.num_classes is 5, but photos makes it 10"):
        configuration.resolve(quick_config(num_classes=5), training_split())
    config = quick_config(batch_size=64)
    config.total_steps, config.num_epochs = None, 0.01
    with pytest.raises(UserError, match="The run would have 0 steps"):
        configuration.resolve(config, training_split())


def test_a_single_class_is_refused():
    train_set = types.SimpleNamespace(name="photos", num_classes=1, class_names=("all",))
    with pytest.raises(UserError, match="photos has a single class, 'all', .*one folder per class"):
        configuration.resolve(quick_config(), train_set)
