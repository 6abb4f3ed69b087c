"""Bytes of an image -> RGB pixels. The converter checks every file with the same function training decodes with.

Shape letters: H W pixels.
"""

from __future__ import annotations

import struct

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

from visft_ds.files import open_image

#: Limit of an image, unless its shards were built with --max-pixels; that of the flag is below what Pillow warns of.
MAX_PIXELS, MOST_PIXELS = 25_000_000, 80_000_000

JPEG = b"\xff\xd8\xff"
PNG = b"\x89PNG\r\n\x1a\n"
#: Other formats people have images in, by how their files begin.
_OTHERS = {b"BM": "BMP", b"GIF8": "GIF", b"RIFF": "WebP", b"II*\0": "TIFF", b"MM\0*": "TIFF"}


def image_format(data: bytes) -> str:
    """ "jpg" or "png", judged by the content. Raises ValueError for anything else: only these two are ever decoded."""
    if data.startswith(JPEG):
        return "jpg"
    if data.startswith(PNG):
        return "png"
    if not data:
        raise ValueError("the file is empty")
    other = next((name for start, name in _OTHERS.items() if data.startswith(start)), None)
    if other is not None:
        raise ValueError(f"neither JPEG nor PNG but {other}; convert it to one of the two")
    raise ValueError(f"neither JPEG nor PNG: it begins with {data[:12]!r}")


def image_size(data: bytes) -> tuple[int, int]:
    """(H, W) from the header alone, as stored: EXIF orientation is not applied. Raises ValueError."""
    if image_format(data) == "jpg":
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        return int(height), int(width)
    if len(data) < 33 or data[12:16] != b"IHDR":
        raise ValueError("a PNG without a header")
    width, height = struct.unpack(">II", data[16:24])
    return height, width


def check_pixels(height: int, width: int, most: int) -> None:
    """Raise ValueError for an image of no pixels, or of more than `most`."""
    if not 0 < height * width <= most:
        raise ValueError(f"{width} x {height} pixels; allowed are 1 to {most} in all")


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> npt.NDArray[np.uint8]:
    """Decode a picture: JPEG by simplejpeg, any other of `files.FORMATS` by Pillow.

    Grey, palette, 16-bit and CMYK pictures become RGB; transparency is dropped. EXIF orientation is not applied:
    shards hold the pixels that the labels fit. Cut files are errors, never half-grey images.

    Args:
        data: the file.
        max_pixels: larger images are refused.

    Returns:
        (H, W, 3) uint8.

    Raises:
        ValueError: no picture, damaged, or larger than `max_pixels`.
    """
    if data.startswith(JPEG):
        check_pixels(*image_size(data), max_pixels)
        return simplejpeg.decode_jpeg(data, colorspace="RGB")
    rgb = np.array(open_image(data, upright=False))
    check_pixels(rgb.shape[0], rgb.shape[1], max_pixels)
    return rgb


def to_rgb(image: Image.Image) -> npt.NDArray[np.uint8]:
    """(H, W, 3) uint8 of a loaded image of any mode of Pillow; transparency is dropped.

    Raises ValueError for pixels that are not of 8 bits.
    """
    if image.mode.startswith(("I", "F")):
        bits = "16 bits per grey value" if "16" in image.mode else f"pixels of mode {image.mode}"
        raise ValueError(f"{bits}; convert it to 8 bits")
    # Through RGBA, because Pillow warns about palettes that carry transparency otherwise.
    rgb = image.convert("RGBA").convert("RGB") if "transparency" in image.info else image.convert("RGB")
    return np.array(rgb)
