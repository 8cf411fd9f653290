"""Decodes JPEGs, PNGs, BMPs and GIFs, or only a part of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

from vit_jax.data import tf
from vit_jax.data.preprocess.orientation import exif_orientation, stored_window, turn_upright
from vit_jax.data.preprocess.resizing import to_uint8


class EncodedImage(NamedTuple):
    """An image of which only the part that is needed is decoded.

    Attributes:
        encoded: a JPEG, PNG or BMP, or a GIF, whose first frame is used.
        channels: 1 or 3; images are converted. Of 16-bit values, the high byte is used.
        exif: whether the image is turned upright: as the orientation in the EXIF data of a JPEG
            or PNG says.
    """

    encoded: tf.Tensor
    channels: int
    exif: bool

    def decode(self, window: Callable | None = None) -> tf.Tensor:
        """Returns the image or a part of it, uint8 (H, W, channels).

        Args:
            window: the image's shape (3,) -> top, left, height and width of the part; None: the
                whole image. Of a JPEG, only the part is decoded.
        """
        if not self.exif:
            return self.decode_stored(window)
        orientation = exif_orientation(self.encoded)

        def decode_and_turn():
            stored = window and functools.partial(stored_window, window, orientation)
            return turn_upright(self.decode_stored(stored), orientation)

        is_upright = tf.equal(orientation, 1)
        return tf.cond(is_upright, lambda: self.decode_stored(window), decode_and_turn)

    def decode_stored(self, window: Callable | None) -> tf.Tensor:
        """Returns the image, or a part of it, as it is stored."""

        def from_jpeg():
            shape = window and tf.io.extract_jpeg_shape(self.encoded)
            return self.decode_jpeg(window and tf.stack(window(shape)))

        def from_other():
            image = tf.io.decode_image(
                self.encoded, channels=self.channels, expand_animations=False
            )
            if window is None:
                return image
            top, left, height, width = window(tf.shape(image))
            return image[top : top + height, left : left + width]

        return tf.cond(tf.io.is_jpeg(self.encoded), from_jpeg, from_other)

    def decode_jpeg(self, corners) -> tf.Tensor:
        """Decodes the part of a JPEG at `corners`, (top, left, height, width), or None: all."""

        def decode(channels):
            if corners is None:
                return tf.io.decode_jpeg(self.encoded, channels=channels)
            return tf.io.decode_and_crop_jpeg(self.encoded, corners, channels=channels)

        if self.channels == 3:
            return decode(3)
        # The JPEG library converts CMYK to color, but not to gray.
        is_cmyk = tf.equal(tf.io.extract_jpeg_shape(self.encoded)[2], 4)
        return tf.cond(is_cmyk, lambda: to_gray(decode(3)), lambda: decode(1))


def to_gray(image) -> tf.Tensor:
    """Converts an image to gray, uint8 (H, W, 3) -> (H, W, 1)."""
    return to_uint8(tf.tensordot(tf.cast(image, tf.float32), [[0.2989], [0.587], [0.114]], 1))
