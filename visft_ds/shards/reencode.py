"""Re-encoding images: smaller files that decode faster, at the price of other pixels.

Annotations stay as they are, in pixels of the original image. That is the frame of `width` and `height` in labels and
index, in which average precision is computed: boxes, polygons, run-length encodings and areas are those of the data set
to the last digit, and so are small, medium and large. The stored image has the same content with fewer pixels; a label
states its size (`stored_width`, `stored_height`), and the manifest's options that the split was re-encoded.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL
import simplejpeg
from PIL import Image

from visft_ds.data.decode import MOST_PIXELS, check_pixels, decode_image

_FORM = re.compile(r"q(\d{1,3})(?::(\d+))?")
_WEBP = (b"RIFF", b"WEBP")


@dataclass(frozen=True)
class Reencoding:
    """JPEG with 4:2:0 chroma of a quality from 1 to 100, with a short side of at most so many pixels."""

    quality: int
    short_side: int | None = None  #: None: the size stays

    @classmethod
    def parse(cls, text: str) -> Reencoding:
        """From "q90:448" (quality and short side) or "q90". Raises ValueError for another form or range."""
        found = _FORM.fullmatch(text)
        if found is None or not 1 <= int(found[1]) <= 100 or (found[2] is not None and int(found[2]) < 1):
            raise ValueError(
                f"--reencode {text!r} is not allowed: write q90:448 for JPEG quality 90 (1 to 100) and a short side of "
                "at most 448 pixels, or q90 to keep the size"
            )
        return cls(int(found[1]), None if found[2] is None else int(found[2]))

    def described(self) -> dict[str, Any]:
        """Settings that determine the bytes, with the libraries' versions: others may encode differently."""
        return {
            "quality": self.quality,
            "short_side": self.short_side,
            "frame": "annotations, width and height: pixels of the original picture",
            "encoder": f"simplejpeg {simplejpeg.__version__}, Pillow {PIL.__version__}",
        }

    def size(self, height: int, width: int) -> tuple[int, int]:
        """(H, W) of the stored image."""
        short = min(height, width)
        if self.short_side is None or short <= self.short_side:
            return height, width
        # rounded; the short side comes out exactly
        twice = 2 * self.short_side
        return (height * twice + short) // (2 * short), (width * twice + short) // (2 * short)

    def encode(self, data: bytes) -> bytes:
        """A checked JPEG, PNG or WebP file -> JPEG; metadata, EXIF orientation included, is discarded."""
        pixels = decode_webp(data, MOST_PIXELS) if is_webp(data) else decode_image(data, max_pixels=MOST_PIXELS)
        height, width = self.size(*pixels.shape[:2])
        if (height, width) != pixels.shape[:2]:
            smaller = Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS)
            pixels = np.asarray(smaller)
        encoded: bytes = simplejpeg.encode_jpeg(pixels, quality=self.quality, colorsubsampling="420")
        return encoded


def is_webp(data: bytes) -> bool:
    """Return True if the data has the signature of a WebP file."""
    return (data[:4], data[8:12]) == _WEBP


def decode_webp(data: bytes, max_pixels: int) -> npt.NDArray[np.uint8]:
    """Decode a WebP file -> (H, W, 3) uint8. Raises ValueError: damaged, animated or too large."""
    try:
        with Image.open(io.BytesIO(data), formats=("WEBP",)) as image:
            check_pixels(image.height, image.width, max_pixels)
            if getattr(image, "n_frames", 1) > 1:
                raise ValueError("a moving WebP picture")
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"damaged WebP: {error}") from error
