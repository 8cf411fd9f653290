"""The orientation in the EXIF data of JPEGs and PNGs, and images turned upright as it says."""

from __future__ import annotations

import functools
from collections.abc import Callable

from vit_jax.data import tf

# How a stored image becomes upright, for each EXIF orientation from 1: whether rows and columns are
# swapped, and then whether the rows, and whether the columns, are reversed.
ORIENTATIONS = (
    (False, False, False),
    (False, False, True),
    (False, True, True),
    (False, True, False),
    (True, False, False),
    (True, False, True),
    (True, True, True),
    (True, True, False),
)


def turn_upright(image, orientation) -> tf.Tensor:
    """Turns a stored image, (H, W, C), as its EXIF orientation, int32 (), says."""
    swapped, *is_reversed = tf.unstack(tf.gather(ORIENTATIONS, orientation - 1))
    upright = tf.cond(swapped, lambda: tf.transpose(image, (1, 0, 2)), lambda: image)
    row_step, column_step = (tf.where(reverse, -1, 1) for reverse in is_reversed)
    return tf.ensure_shape(upright[::row_step, ::column_step], (None, None, image.shape[-1]))


def stored_window(window: Callable, orientation, shape) -> list[tf.Tensor]:
    """Returns where a window of the upright image lies in the stored one.

    Args:
        window: the upright image's shape (3,) -> top, left, height and width.
        orientation: the EXIF orientation, int32 ().
        shape: the stored image's shape (3,).
    """
    swapped, reversed_rows, reversed_columns = tf.unstack(tf.gather(ORIENTATIONS, orientation - 1))
    shape = tf.where(swapped, tf.gather(shape, (1, 0, 2)), shape)
    top, left, height, width = window(shape)
    top = tf.where(reversed_rows, shape[0] - top - height, top)
    left = tf.where(reversed_columns, shape[1] - left - width, left)
    corners = tf.stack([top, left, height, width])
    return tf.unstack(tf.where(swapped, tf.gather(corners, (1, 0, 3, 2)), corners))


def exif_orientation(encoded) -> tf.Tensor:
    """Returns the orientation in an image's EXIF data, int32 () from 1 to 8; 1 if it has none."""
    return traced_search()(encoded)


@functools.cache
def traced_search() -> Callable:
    """Returns `search_orientation`, traced once instead of for each pipeline."""
    signature = [tf.TensorSpec((), tf.string)]
    return tf.function(search_orientation, input_signature=signature, autograph=False)


def search_orientation(encoded) -> tf.Tensor:
    """Returns the orientation in an image's EXIF data; see `exif_orientation`."""

    def parse(start, little_endian):
        read = functools.partial(read_numbers, encoded, little_endian=little_endian)
        directory = start + read(start + 4, tf.int32, 1)[0]
        num_entries = tf.maximum(read(directory, tf.uint16, 1)[0], 1)
        # An entry has 12 bytes: tag, type, number of values (4 bytes), value (4 bytes).
        entries = tf.reshape(read(directory + 2, tf.uint16, 6 * num_entries), (-1, 6))
        is_orientation = tf.equal(entries[:, 0], 0x0112)
        value = tf.reduce_max(tf.where(is_orientation, entries[:, 4], 1))
        return tf.where((value >= 1) & (value <= 8), value, 1)

    def parse_either(start):
        order = read_numbers(encoded, start, tf.uint16, 1)[0]
        is_little_endian = tf.equal(order, int.from_bytes(b"II"))  # or b"MM"
        return tf.cond(is_little_endian, lambda: parse(start, True), lambda: parse(start, False))

    def search():
        start = tf.cond(
            tf.io.is_jpeg(encoded), lambda: exif_in_jpeg(encoded), lambda: exif_in_png(encoded)
        )
        return tf.cond(tf.equal(start, 0), lambda: tf.constant(1), lambda: parse_either(start))

    return tf.cond(may_have_exif(encoded), search, lambda: tf.constant(1))


def may_have_exif(encoded) -> tf.Tensor:
    """Returns False for JPEGs whose only application data is JFIF's; faster than searching."""
    marker, length = tf.unstack(read_numbers(encoded, 2, tf.uint16, 2))
    after_jfif = tf.where(tf.equal(marker, 0xFFE0), 4 + length, 2)
    marker = read_numbers(encoded, after_jfif, tf.uint16, 1)[0]
    return tf.equal(marker // 16, 0xFFE) | ~tf.io.is_jpeg(encoded)


def exif_in_jpeg(encoded) -> tf.Tensor:
    """Returns where the EXIF data of a JPEG starts, int32 (); 0 if it has none."""

    def read_segment(start):  # marker, length, "Exif"
        return start, read_numbers(encoded, start, tf.uint16, 4)

    def is_exif(segment):
        return tf.reduce_all(tf.equal(segment * (1, 0, 1, 1), (0xFFE1, 0, 0x4578, 0x6966)))

    def is_other_data(_, segment):  # of an application, before the image
        return tf.equal(segment[0] // 16, 0xFFE) & ~is_exif(segment)

    start, segment = tf.while_loop(
        is_other_data,
        lambda start, segment: read_segment(start + 2 + segment[1]),
        read_segment(tf.constant(2)),
    )
    return tf.where(is_exif(segment), start + 10, 0)


def exif_in_png(encoded) -> tf.Tensor:
    """Returns where the EXIF data of a PNG starts, int32 (); 0 if it has none or isn't a PNG."""

    def read_chunk(start):  # length, kind
        return start, read_numbers(encoded, start, tf.int32, 2)

    def is_before_exif(_, chunk):
        stops = tf.equal(chunk[1], [int.from_bytes(kind) for kind in (b"eXIf", b"IDAT", b"\0" * 4)])
        return (chunk[0] >= 0) & ~tf.reduce_any(stops)

    _, signature = read_chunk(0)
    is_png = tf.equal(signature[1], int.from_bytes(b"\r\n\x1a\n"))
    start, chunk = tf.while_loop(
        is_before_exif,
        lambda start, chunk: read_chunk(start + 12 + chunk[0]),
        read_chunk(tf.where(is_png, 8, tf.strings.length(encoded))),
    )
    return tf.where(tf.equal(chunk[1], int.from_bytes(b"eXIf")), start + 8, 0)


def read_numbers(encoded, start, dtype, count, little_endian: bool = False) -> tf.Tensor:
    """Returns `count` numbers from the bytes of an image, int32; zeros after its end."""
    start = tf.clip_by_value(start, 0, tf.strings.length(encoded))
    num_bytes = dtype.size * count
    raw = tf.strings.substr(encoded, start, num_bytes)
    numbers = tf.io.decode_raw(raw, dtype, little_endian=little_endian, fixed_length=num_bytes)
    return tf.cast(numbers, tf.int32)
