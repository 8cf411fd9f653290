"""Recognizes the codebase of a state dict: timm's, or transformers'."""

from types import ModuleType

from vit_jax.errors import UserError
from vit_jax.pretrained.codebases import architecture, hf, timm
from vit_jax.pretrained.codebases.settings import get_setting

# The kernel that embeds the patches -> the codebase whose name for it this is.
KERNELS = {
    "embeddings.patch_embeddings.projection.weight": hf,
    "embeddings.patch_embeddings.weight": hf,
    "embeddings.patch_embedding.weight": hf,
    "patch_embed.proj.weight": timm,
}


def recognize(path: str, tensors, config: dict) -> tuple[ModuleType, int, dict]:
    """Returns what is needed to read a state dict.

    Args:
        path: for messages.
        tensors: the state dict.
        config: config.json; {} if missing.

    Returns:
        (the codebase, the model's width, the config of its vision model).

    Raises:
        UserError: it is of a model that this code doesn't have, or of none.
    """
    config = hf.vision_config(path, config)
    model_type = get_setting(config, path, "model_type", str, "vit")
    compared = [] if model_type in hf.WITH_OTHER_PARTS else tensors
    if model_type not in hf.FAMILIES or architecture.recognize_other_model(compared):
        raise UserError(f"{path} can't be read: {architecture.describe_contents(tensors, config)}")
    prefix = hf.PREFIXES.get(model_type, f"{model_type}.")
    for kernel, codebase in KERNELS.items():
        for name in (kernel, f"{prefix}{kernel}"):
            if name in tensors and tensors[name].ndim == 4:
                return codebase, len(tensors[name]), config
    described = architecture.describe_contents(tensors, config)
    raise UserError(f"{path} holds no Vision Transformer: {described}")
