"""Bytes of an image -> RGB pixels. Builds check each file with the function that training decodes with."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import simplejpeg

from visft_ds.files import MAX_PIXELS, check_scans, open_image

_JPEG = b"\xff\xd8\xff"


def decode_image(data: bytes, most: int = MAX_PIXELS) -> npt.NDArray[np.uint8]:
    """Decode a picture: JPEG by simplejpeg, any other of `files.FORMATS` by Pillow.

    Pictures of every kind become RGB as `open_image` says. EXIF orientation is not applied: shards hold the
    pixels that the labels fit. Cut files are errors, never half-grey images.

    Returns:
        (H, W, 3) uint8.

    Raises:
        ValueError: no picture, damaged, of more than `most` pixels, or a JPEG of hundreds of scans.
    """
    if not data.startswith(_JPEG):
        return np.array(open_image(data, upright=False, quiet=True, most=most))
    check_scans(data)
    height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    if not 0 < height * width <= most:
        raise ValueError(f"{width} x {height} pixels; allowed are 1 to {most:,} in all")
    return simplejpeg.decode_jpeg(data, colorspace="RGB")
