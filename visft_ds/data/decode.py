"""Bytes of an image -> RGB pixels, or levels of bands. Builds check each file with the function that training
decodes with.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import simplejpeg

from visft_ds.files import MAX_PIXELS, check_scans, open_image, read_bands
from visft_ds.settings.bands import Bands, in_words

_JPEG = b"\xff\xd8\xff"


def decode_image(
    data: bytes, most: int = MAX_PIXELS, buffer: npt.NDArray[np.uint8] | None = None
) -> npt.NDArray[np.uint8]:
    """Decode a picture: JPEG by simplejpeg, any other of `files.FORMATS` by Pillow.

    Pictures of every kind become RGB as `open_image` says. EXIF orientation is not applied: shards hold the
    pixels that the labels fit. Cut files are errors, never half-grey images.

    Args:
        data: content of the file.
        most: pixels that are decoded.
        buffer: (H, W, 3) that the pixels of a JPEG are written into, row by row.

    Returns:
        (H, W, 3) uint8.

    Raises:
        ValueError: no picture, damaged, of more than `most` pixels, or a JPEG of hundreds of scans.
    """
    if not data.startswith(_JPEG):
        return np.array(open_image(data, upright=False, most=most))
    check_scans(data)
    height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    if not 0 < height * width <= most:
        raise ValueError(f"{width} x {height} pixels; allowed are 1 to {most:,} in all")
    return simplejpeg.decode_jpeg(data, colorspace="RGB", buffer=buffer)


def stored_pixels(data: bytes, bands: Bands | None) -> npt.NDArray[Any]:
    """RGB of a picture in a shard, or the values of its bands."""
    return decode_image(data) if bands is None else read_bands(data)


def levels(values: npt.NDArray[Any], bands: Bands) -> npt.NDArray[np.float32]:
    """Values (H, W, n) of the bands that are read -> levels, as `Bands` says; of NaN 0.

    All 65,536 values of 16 bits have levels of their own.
    """
    low, high = bands.range
    scaled = (values.astype(np.float32) - np.float32(low)) * np.float32(255 / (high - low))
    return np.nan_to_num(scaled, nan=0.0).clip(0, 255)


def bands_of(values: npt.NDArray[Any], bands: Bands, name: str) -> npt.NDArray[Any]:
    """The bands that a model reads (H, W, n), of all values (H, W, bands) of a picture.

    Raises ValueError for a picture of another number of bands, or other values.
    """
    count = values.shape[2]
    if (count, str(values.dtype)) != (bands.count, bands.kind):
        raise ValueError(
            f"{name}: {count} bands of {values.dtype}, and the model reads {in_words(bands)}: give pictures "
            "of that kind, or another model"
        )
    return values[..., [number - 1 for number in bands.numbers]]


def as_rgb(pixels: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Pixels, or levels of bands, as RGB (H, W, 3) for people: three bands, or of fewer the first as grey."""
    if pixels.dtype == np.uint8:
        return pixels
    seen = pixels[..., :3] if pixels.shape[2] >= 3 else pixels[..., [0, 0, 0]]
    return seen.round().astype(np.uint8)
