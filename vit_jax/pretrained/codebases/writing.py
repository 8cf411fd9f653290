"""What the writers share: `Export`, what is written, and which models a codebase has."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from vit_jax.models import FIELDS_OF_TRAINING, VisionTransformer
from vit_jax.pretrained.codebases import architecture
from vit_jax.pretrained.codebases.settings import RESAMPLE_CODES

# Each codebase has a table REPRESENTABLE: field -> the allowed values. Fields in ANY_VALUE don't
# matter to any: sizes, positions (written as a table), and what only concerns training or speed.
# Another field that isn't in the table must have its default.
ANY_VALUE = (
    *("num_classes", "patch_size", "width", "depth", "num_heads", "mlp_dim", "posemb"),
    *FIELDS_OF_TRAINING,
    *("parent", "name"),  # Flax's own
)
ANY = "any value"

# Fields that may have these other values if `approximate` is set.
APPROXIMABLE = {"gelu": ("tanh", "exact"), "layer_norm_eps": ANY}


def unrepresentable(model, table: dict, approximate: bool) -> Iterator[tuple]:
    """Yields each field that a codebase's table doesn't allow.

    Yields:
        The name, the allowed values, and whether `approximate` would allow its value.
    """
    for field in dataclasses.fields(model):
        if field.name in ANY_VALUE and field.name not in table:
            continue
        value = getattr(model, field.name)
        allowed = table.get(field.name, (field.default,))
        approximable = APPROXIMABLE.get(field.name, ())
        approximable = approximable == ANY or value in approximable
        if allowed != ANY and value not in allowed and not (approximate and approximable):
            yield field.name, allowed, approximable


@dataclasses.dataclass(frozen=True)
class Export:
    """Parameters ready to be written, with what the JSON files beside them tell.

    Attributes:
        params: name -> float32 array, with unstacked blocks and a table of positions.
        model: the VisionTransformer.
        image_size: (height, width).
        mean, std: how images are normalized; of pixels in [0, 1].
        eval_crop, eval_method: what evaluation sees of images, see `Weights`.
        class_names: in the order of the labels, or None.
    """

    params: dict[str, np.ndarray]
    model: VisionTransformer
    image_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    eval_crop: float | str
    eval_method: str
    class_names: Sequence[str] | None

    @property
    def channels(self) -> int:
        return num_channels(self.params)

    @property
    def interpolation(self) -> str:
        """The method of timm and transformers that is closest to `eval_method`."""
        kernel = self.eval_method.partition("_")[0]
        return kernel if kernel in RESAMPLE_CODES else "bilinear"


def num_channels(params) -> int:
    """Returns how many channels the images have of the model with these parameters."""
    return architecture.num_channels({name: value.shape for name, value in params.items()})


def per_channel(values, channels: int) -> list[float]:
    """Returns a number for each channel, of one number for all or one for each."""
    return list(values) * (channels if len(values) == 1 else 1)
