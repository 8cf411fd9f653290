"""Encoded image -> uint8 pixels of the size that the model sees, as stateless TensorFlow ops.

views.py has the views for training and for evaluation, and tells how to add an augmentation.
"""

from vit_jax.data.preprocess.crops import CROP_DISTRIBUTIONS, CROPS, area_window
from vit_jax.data.preprocess.decoding import EncodedImage
from vit_jax.data.preprocess.orientation import exif_orientation
from vit_jax.data.preprocess.resizing import resize
from vit_jax.data.preprocess.views import check, describe, eval_image, image_shape, train_image

__all__ = [
    "CROPS",
    "CROP_DISTRIBUTIONS",
    "EncodedImage",
    "area_window",
    "check",
    "describe",
    "eval_image",
    "exif_orientation",
    "image_shape",
    "resize",
    "train_image",
]
