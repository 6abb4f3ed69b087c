"""Masks as COCO's run-length codes, with their counts as text, and maps of numbers as PNG files in labels."""

from __future__ import annotations

import base64
import io
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from faster_coco_eval import mask as coco_mask  # pycocotools' own warns under NumPy 2
from PIL import Image

from visft_ds.files import MAX_PIXELS, reading


def pixels_of_png(
    data: bytes, name: object, what: str, modes: Collection[str], remedy: str
) -> npt.NDArray[Any]:
    """The values of a PNG of one of these modes of Pillow.

    Raises ValueError for another picture, which has this `name` and should be `what`.
    """
    with reading(str(name), what), Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        if image.mode not in modes:
            raise ValueError(f"it is a picture of mode {image.mode}: {remedy}")
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels; allowed are {MAX_PIXELS:,} in all")
        return np.asarray(image)


def text_of_png(data: bytes) -> str:
    """A PNG file as a label has it."""
    return base64.b64encode(data).decode("ascii")


def png_of(stored: Mapping[str, Any]) -> bytes:
    """The PNG file of a map in a label. Raises ValueError for another text."""
    return base64.b64decode(stored["png"], validate=True)


def code_of(mask: npt.NDArray[Any]) -> dict[str, Any]:
    """The code of a mask (H, W), which goes down its columns."""
    code = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(mask.shape), "counts": code["counts"].decode("ascii")}


def object_of(mask: npt.NDArray[Any]) -> dict[str, Any]:
    """Box, area and mask of an object, as COCO's annotations have them, in pixels."""
    code = code_of(mask)
    return {
        "bbox": coco_mask.toBbox(code).tolist(),
        "area": int(coco_mask.area(code)),
        "iscrowd": 0,
        "segmentation": code,
    }
