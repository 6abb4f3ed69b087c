"""Panoptic maps: PNG files whose colours are numbers of segments, red + 256 green + 65536 blue, as COCO and
Cityscapes have them (https://cocodataset.org/#format-data).

A label has {"panoptic": {"png": base64 of the file, "segments": [{"id": 3226956, "category_id": 1,
"iscrowd": 0}, ...]}}. What belongs to no segment, such as 0, is void: it counts nowhere.
"""

from __future__ import annotations

import io
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from visft_ds.data.masks import object_of, pixels_of_png, png_of, text_of_png

NUMBERS = 1 << 24  #: of segments, that a colour can say
_PLACES = np.array([1, 256, 65_536], dtype=np.uint32)  # of red, green and blue

Numbers = npt.NDArray[np.uint32]
Stored = Mapping[str, Any]  #: as a label has it


def read_segment_numbers(data: bytes) -> Numbers:
    """(H, W) numbers of segments in an RGB PNG. Raises ValueError for another picture."""
    remedy = "give RGB, as COCO's panoptic maps are"
    colours = pixels_of_png(data, "panoptic map", "an RGB PNG", ("RGB",), remedy)
    numbers: Numbers = colours.astype(np.uint32) @ _PLACES
    return numbers


def stored_panoptic(data: bytes, segments: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A PNG and its segments as a label has them."""
    return {"png": text_of_png(data), "segments": list(segments)}


def objects_of(panoptic: Stored) -> list[dict[str, Any]]:
    """The segments of a map in a label as COCO's objects, with box, area and run-length code; those without
    a pixel are left out.
    """
    numbers = read_segment_numbers(png_of(panoptic))
    columns = np.asfortranarray(numbers)  # run-length codes go down columns
    objects = []
    for segment in panoptic["segments"]:
        whole = {**segment, **object_of(columns == segment["id"]), "iscrowd": segment["iscrowd"]}
        if whole["area"] > 0:
            objects.append(whole)
    return objects


def png_of_numbers(numbers: npt.NDArray[Any]) -> bytes:
    """An RGB PNG of the numbers (H, W) of segments."""
    colours = numbers[..., None] // _PLACES % 256
    file = io.BytesIO()
    Image.fromarray(colours.astype(np.uint8)).save(file, "PNG", compress_level=1)
    return file.getvalue()


def problem_of(panoptic: Any, categories: Collection[int]) -> str | None:
    """The error of a panoptic map in a label of these categories; None: nothing."""
    if not isinstance(panoptic, dict) or not isinstance(panoptic.get("png"), str):
        return "panoptic must have a base64 text png, and segments"
    if not isinstance(panoptic.get("segments"), list):
        return "panoptic must have a list of segments"
    for segment in panoptic["segments"]:
        problem = problem_of_segment(segment, categories)
        if problem is not None:
            return problem
    return None


def problem_of_segment(segment: Any, categories: Collection[int]) -> str | None:
    """The error of a segment; None: nothing."""
    if not isinstance(segment, dict):
        return f"segment {segment!r:.40} must be an object with id, category_id and iscrowd"
    number = segment.get("id")
    if type(number) is not int or not 0 < number < NUMBERS:
        return f"id {number!r:.20} of a segment must be a whole number from 1 to {NUMBERS - 1}"
    category = segment.get("category_id")
    if type(category) is not int or category not in categories:
        return f"category_id {category!r:.20} of segment {number} is not among the panoptic categories"
    if segment.get("iscrowd") not in (0, 1):
        return f"iscrowd of segment {number} must be 0 or 1"
    return None
