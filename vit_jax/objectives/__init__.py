"""What a run trains a model to do: `config.objective`."""

from vit_jax.checks import check_choice
from vit_jax.models import OBJECTIVES, predicts_classes
from vit_jax.objectives import masked_patches

__all__ = ["check", "describe", "trained_module"]


def trained_module(model, config):
    """Returns the module whose parameters a run trains.

    Args:
        model: the run's VisionTransformer.
        config: its configuration.

    Returns:
        The model itself; or a MaskedPatchPredictor, which has its parameters and two more.
    """
    return model if predicts_classes(config) else masked_patches.create(model, config)


def describe(config, model, image_shape: tuple[int, int, int]) -> str:
    """Returns a line about what a run that doesn't predict classes predicts."""
    return masked_patches.describe(config, model, image_shape)


def check(config, model, image_shape: tuple[int, int, int]) -> None:
    """Raises UserError if a configuration is invalid for its objective.

    Args:
        config: a run's configuration.
        model: its VisionTransformer.
        image_shape: (H, W, C).
    """
    check_choice("config.objective", config.objective, OBJECTIVES)
    masked_patches.check_settings(config.masked_patches)
    if not predicts_classes(config):
        masked_patches.check(config, model, image_shape)
