"""Small models of timm and transformers with random parameters, and what they compute.

tests/pretrained/test_peers.py compares with them, and tests/golden/record.py records them. Needs
PyTorch, timm and transformers only where they are called.
"""

import math

import numpy as np


def randomize(model):
    """Draws every parameter of a PyTorch model at random: zeros and ones would hide mistakes.

    Activations stay of order 1, so that attention isn't uniform, and its rotations show.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1 and name.endswith("weight"):  # outputs first
                drawn *= 0.7 / math.sqrt(parameter[0].numel())
            else:
                drawn *= 0.2
            if parameter.ndim == 1 and not name.endswith("bias"):  # of norms and LayerScale
                drawn += 1.0
            parameter.copy_(drawn)
    return model.eval()


def create_timm(architecture: str, arguments: dict):
    """Returns a model of timm."""
    import timm

    return randomize(timm.create_model(architecture, **arguments))


def save_timm(model, folder, arguments: dict) -> None:
    """Writes a folder as timm's hub has it."""
    import timm

    timm.models.save_for_hf(model, folder, model_args=arguments, safe_serialization=True)


def create_hf(name: str, settings: dict):
    """Returns a model of transformers; `name` is its class, `settings` are its configuration's."""
    import transformers

    model_class = getattr(transformers, name)
    return randomize(model_class(model_class.config_class(**settings)))


def compute(model, images) -> dict[str, np.ndarray]:
    """Returns what a model of timm or transformers computes from images.

    Args:
        images: float32 (N, H, W, C).

    Returns:
        Of timm "logits" (N, classes), or "features" (N, D) without a head, and "tokens" (N, L, D).
        Of transformers "logits" or "pooler_output" (N, D), if the model has one of them, and
        "last_hidden_state" (N, L, D).
    """
    import torch

    images = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        outputs = compute_timm(model, images) if is_timm(model) else compute_hf(model, images)
    return {name: value.numpy() for name, value in outputs.items() if value is not None}


def is_timm(model) -> bool:
    return hasattr(model, "forward_features")


def compute_timm(model, images) -> dict:
    name = "logits" if model.num_classes else "features"
    return {name: model(images), "tokens": model.forward_features(images)}


def compute_hf(model, images) -> dict:
    import torch

    if hasattr(model, "classifier"):
        outputs = model(images, output_hidden_states=True)
        tokens = model.base_model.layernorm(outputs.hidden_states[-1])
        return {"logits": outputs.logits, "last_hidden_state": tokens}
    if model.config.model_type == "vit_mae":  # without noise, the patches keep their order
        num_patches = model.vit.embeddings.patch_embeddings.num_patches
        noise = torch.arange(float(num_patches)).repeat(len(images), 1)
        return {"last_hidden_state": model.vit(images, noise=noise).last_hidden_state}
    outputs = getattr(model, "vision_model", model)(images)
    return {name: getattr(outputs, name) for name in ("last_hidden_state", "pooler_output")}
