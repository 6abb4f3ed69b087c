"""The label of a sample: the JSON file beside each image in a shard.

    {"image_id": 139, "file_name": "000000000139.jpg", "width": 640, "height": 426, "license": 2,
     "annotations": [{"id": 1, "bbox": [x, y, width, height], "category_id": 64, "iscrowd": 0, "area": 531.8,
                      "segmentation": [[x, y, x, y, ...], ...] or {"size": [height, width], "counts": ...}}, ...],
     "captions": ["A room with a table.", ...]}

`license` and `segmentation` may be left out, other fields are kept and ignored. Annotations are in pixels of an image
of `width` x `height`; where the stored one has another size, `stored_width` and `stored_height` say so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

_FIELDS: Mapping[str, type] = {"image_id": int, "file_name": str, "width": int, "height": int}
_LISTS = ("annotations", "captions")


def parse_label(data: bytes) -> dict[str, Any]:
    """Read and check a label.

    Raises:
        ValueError: no JSON object, or a field lacks or has another type; names it.
    """
    try:
        label = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"it is not valid JSON: {error}") from error
    if not isinstance(label, dict):
        raise ValueError("it is no JSON object")
    missing = [name for name in (*_FIELDS, *_LISTS) if name not in label]
    if missing:
        raise ValueError(f"it has no {', '.join(map(repr, missing))}")
    for name, kind in _FIELDS.items():
        if type(label[name]) is not kind:
            raise ValueError(f"its {name!r} is {label[name]!r:.40}, no {'integer' if kind is int else 'string'}")
    if not 0 <= label["image_id"] < 1 << 63 or not (0 < label["width"] < 1 << 31 and 0 < label["height"] < 1 << 31):
        raise ValueError(
            f"its image_id {label['image_id']} or size {label['width']} x {label['height']} is out of range: "
            "allowed are ids from 0 to 2**63 - 1, sides from 1 to 2**31 - 1"
        )
    stored = [label[name] for name in ("stored_width", "stored_height") if name in label]
    if len(stored) == 1 or not all(type(side) is int and 0 < side < 1 << 31 for side in stored):
        raise ValueError("its 'stored_width' and 'stored_height' are not two sides in pixels")
    for name in _LISTS:
        if not isinstance(label[name], list):
            raise ValueError(f"its {name!r} is no list")
    for place, annotation in enumerate(label["annotations"]):
        wrong = _wrong_field(annotation)
        if wrong:
            raise ValueError(f"entry {place} of its annotations {wrong}")
    if not all(isinstance(caption, str) for caption in label["captions"]):
        raise ValueError("its captions are not all strings")
    return label


def stored_size(label: Mapping[str, Any]) -> tuple[int, int]:
    """(height, width) of the image in the shard."""
    return label.get("stored_height", label["height"]), label.get("stored_width", label["width"])


def trainable(label: Mapping[str, Any]) -> int:
    """Number of annotations that are not crowd and have area inside the image."""
    width, height = label["width"], label["height"]
    return sum(not item["iscrowd"] and has_area(item["bbox"], width, height) for item in label["annotations"])


def has_area(bbox: Sequence[float], width: int, height: int) -> bool:
    """Return True if a part of a box (left, top, width, height) with an area lies inside an image of this size."""
    left, top, wide, high = bbox
    return min(left + wide, width) > max(left, 0) and min(top + high, height) > max(top, 0)


def _wrong_field(annotation: Any) -> str | None:
    """Reason why an annotation is invalid; None if it is valid."""
    if not isinstance(annotation, dict):
        return "is no object"
    for name in ("id", "category_id"):
        if type(annotation.get(name)) is not int:
            return f"has no integer {name!r}"
    if annotation.get("iscrowd") not in (0, 1):
        return "has no 'iscrowd' of 0 or 1"
    bbox, area = annotation.get("bbox"), annotation.get("area")
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(map(_is_number, bbox)):
        return f"has no 'bbox' of four numbers: {bbox!r:.60}"
    if not _is_number(area):
        return f"has no number 'area': {area!r:.40}"
    if not isinstance(annotation.get("segmentation", []), list | dict | None):
        return "has a 'segmentation' that is neither polygons nor a run-length code"
    return None


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def whole_image(size: tuple[int, int], category: int) -> dict[str, Any]:
    """An annotation that fills an image of `size`, (height, width)."""
    height, width = size
    outline = [0, 0, width, 0, width, height, 0, height]
    return {"bbox": [0, 0, width, height], "category_id": category, "iscrowd": 0, "segmentation": [outline]}
