"""JPEGs become the same RGB pixels as in other programs, or are refused. (Other formats: see
`tests/test_files.py`.)
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from visft_ds.data.decode import decode_image

PIXELS = np.random.default_rng(0).integers(0, 256, (19, 30, 3), dtype=np.uint8)


def _file(kind: str, mode: str = "RGB", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def _pillow(data: bytes) -> npt.NDArray[np.uint8]:
    return np.array(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize(
    ("data", "tolerance"),
    [
        (_file("JPEG"), 0),
        (_file("JPEG", progressive=True), 0),
        (_file("JPEG", "L"), 0),
        (_file("JPEG", "CMYK"), 1),  # two ways of rounding in the conversion from CMYK
        (_file("JPEG") + b"junk after the end", 0),
        (_file("PNG"), 0),
    ],
)
def test_pixels_equal_pillows(data: bytes, tolerance: int) -> None:
    pixels = decode_image(data)
    assert pixels.shape == (19, 30, 3) and pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - _pillow(data)).max() <= tolerance


def test_rotation_in_exif_is_not_applied() -> None:
    """COCO annotates the pixels as stored; a decoder that turns the picture makes every box wrong."""
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_image(_file("JPEG", exif=exif)).shape == (19, 30, 3)


def test_cut_ones_and_too_many_pixels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"JPEG|Premature"):
        decode_image(_file("JPEG")[:-2])
    with pytest.raises(ValueError, match="pixels"):
        decode_image(_file("JPEG"), most=569)
