"""Checking an image file: whether it decodes and fits its annotations, and its perceptual hash.

Shape letters: H W pixels.
"""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import simplejpeg
from isal import isal_zlib
from PIL import Image

from visft_ds.data.decode import MAX_PIXELS, check_pixels, decode_image, image_format, image_size
from visft_ds.shards.reencode import decode_webp, is_webp
from visft_ds.shards.source import SourceImage

CheckLevel = Literal["decode", "header", "none"]
#: decode: every byte goes through the decoder; header: format and size; none: format alone.
CHECK_LEVELS: tuple[CheckLevel, ...] = ("decode", "header", "none")

_ORIENTATION = 0x0112  # the EXIF tag
_PACKED = ("JPEG", "PNG", "WEBP")  # Pillow's names of what shards may be made of
#: Colour spaces whose first component is luma; libjpeg then decodes it without the others' arithmetic.
_WITH_BRIGHTNESS = ("YCbCr", "Gray")
#: Shortest side in pixels of the thumbnail that is hashed, where the file has that many. Averages over cells of fewer
#: pixels differ too much between an image and a smaller copy of it.
_HASHED_SIDE = 40
_ROWS, _COLUMNS = 8, 9  # of the hash: eight differences in each row


@dataclass(frozen=True)
class Checked:
    """Result of checking an image file."""

    extension: str = "jpg"  #: "jpg", "png" or "webp", by the content
    crc32: int = 0
    reason: str | None = None  #: why it is quarantined
    detail: str = ""
    findings: tuple[str, ...] = ()
    dhash: int = 0  #: see `difference_hash`; 0 where nothing was decoded


def check_image(
    data: bytes,
    image: SourceImage,
    level: CheckLevel = "decode",
    *,
    convert: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> Checked:
    """Check an image file.

    Args:
        data: the file.
        image: what the JSON says about it.
        level: depth of the check, see `CHECK_LEVELS`.
        convert: it is going to be re-encoded, so that WebP is allowed as well; `level` is "decode" then.
        max_pixels: larger images are refused, as by whoever reads the shards.
    """
    assert level == "decode" or not convert
    crc32 = isal_zlib.crc32(data)
    try:
        extension = "webp" if convert and is_webp(data) else image_format(data)
        if level == "none":
            check_pixels(image.height, image.width, max_pixels)
            return Checked(extension, crc32, findings=tuple(_named_otherwise(extension, image, convert)))
        decoded = _decoded(data, extension, max_pixels) if level == "decode" else (_header_size(data, max_pixels), 0)
        (height, width), dhash = decoded
        mode, orientation = _header(data)
    except ValueError as error:
        return Checked(crc32=crc32, reason="unreadable", detail=str(error))
    if (height, width) != (image.height, image.width):
        rotated = orientation >= 5 and (width, height) == (image.height, image.width)
        hint = "; it fits after EXIF rotation: store the picture upright" if rotated else ""
        detail = f"the file has {width} x {height} pixels, the JSON says {image.width} x {image.height}{hint}"
        return Checked(extension, crc32, "size differs", detail)
    found = list(_named_otherwise(extension, image, convert))
    if orientation != 1:
        found.append("EXIF rotation")
    if mode in ("1", "L", "LA"):
        found.append("grey image")
    if mode == "CMYK":
        found.append("CMYK image")
    return Checked(extension, crc32, findings=tuple(found), dhash=dhash)


def _named_otherwise(extension: str, image: SourceImage, convert: bool) -> Iterator[str]:
    if extension == "webp":
        yield "WebP converted"
    if extension == "png" and not convert and not image.file_name.lower().endswith(".png"):
        yield "PNG named otherwise"


def _decoded(data: bytes, extension: str, max_pixels: int) -> tuple[tuple[int, int], int]:
    """((H, W), hash) of a file that decodes without a complaint. Raises ValueError for any other."""
    if extension == "webp":
        return _hashed(decode_webp(data, max_pixels))
    if extension == "png":
        return _hashed(decode_image(data, max_pixels=max_pixels))
    height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    if colours not in _WITH_BRIGHTNESS:
        return _hashed(decode_image(data, max_pixels=max_pixels))
    check_pixels(height, width, max_pixels)
    # All of the compressed data is read, as in training, so that any damage shows. But the inverse transform is that of
    # the smallest image that can be hashed, an eighth as large for most, and there is no colour.
    grey = simplejpeg.decode_jpeg(data, colorspace="GRAY", min_height=_HASHED_SIDE, min_width=_HASHED_SIDE)
    return (int(height), int(width)), difference_hash(grey[..., 0])


def _hashed(rgb: npt.NDArray[np.uint8]) -> tuple[tuple[int, int], int]:
    grey = Image.fromarray(rgb).convert("L")
    smaller = grey.reduce(max(1, min(grey.size) // _HASHED_SIDE))
    return rgb.shape[:2], difference_hash(np.asarray(smaller))


def _header_size(data: bytes, max_pixels: int) -> tuple[int, int]:
    height, width = image_size(data)
    check_pixels(height, width, max_pixels)
    return height, width


def stored_frame(path: Path) -> tuple[int, int, int]:
    """(H, W, EXIF orientation) of an image file as it is stored, by its header; (1, 1, 1) for one that cannot be read:
    a build looks at all of it, and leaves it out with the reason."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)  # too large for shards
            with Image.open(path, formats=_PACKED) as image:
                width, height = image.size
                return height, width, _orientation(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        return 1, 1, 1


def difference_hash(grey: npt.NDArray[np.uint8]) -> int:
    """Perceptual hash of 64 bits, of which few change when an image is scaled, re-encoded or made brighter.

    The image is averaged over 8 x 9 cells; each bit says whether a cell is brighter than its left neighbour (the
    "dHash" of N. Krawetz, https://www.hackerfactor.com/blog/?/archives/529-Kind-of-Like-That.html). Averages are exact
    integers, so that the hash depends on the pixels alone. An image of one colour has hash 0, as if it had none.

    Args:
        grey: (H, W) uint8.
    """
    height, width = grey.shape
    # Products of integers: numpy does these itself, whereas a BLAS library would start threads of its own.
    cells = _overlaps(height, _ROWS) @ grey.astype(np.int64) @ _overlaps(width, _COLUMNS).T
    return int.from_bytes(np.packbits(cells[:, 1:] > cells[:, :-1]).tobytes(), "big")


@lru_cache(maxsize=1024)
def _overlaps(pixels: int, cells: int) -> npt.NDArray[np.int64]:
    """(cells, pixels) overlap of each pixel with each cell, in units in which every cell has the same weight."""
    start, pixel = np.arange(cells)[:, None] * pixels, np.arange(pixels)[None] * cells
    return (np.minimum(start + pixels, pixel + cells) - np.maximum(start, pixel)).clip(0)


def _header(data: bytes) -> tuple[str, int]:
    """(Pillow's mode, EXIF orientation or 1). Raises ValueError for a file that Pillow does not know."""
    try:
        image = Image.open(io.BytesIO(data), formats=_PACKED)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError("its header is damaged: Pillow cannot read it") from error
    with image:
        return image.mode, _orientation(image)


def _orientation(image: Image.Image) -> int:
    try:
        # Not image.getexif(), which for a PNG decodes all pixels to find what may stand behind them: that is missed.
        return int(Image.Image.getexif(image).get(_ORIENTATION, 1))
    except (OSError, SyntaxError, ValueError, TypeError, struct.error):
        return 1  # damaged EXIF data says nothing about the orientation
