"""Content of a label: checked when shards are built, and again when read, as shards may come from others.

A label is the JSON file beside an image in a shard:
{"image_id": 139, "file_name": "000000000139.jpg", "width": 640, "height": 426,
 "annotations": [{"id": 1, "bbox": [x, y, width, height], "category_id": 64, "iscrowd": 0, "area": 531.8,
                  "segmentation": [[x, y, x, y, ...], ...] or {"size": [height, width], "counts": ...}}, ...],
 "captions": ["A room with a table.", ...]}
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import orjson

# not among its Python names; `decode` costs thirty times as much
from faster_coco_eval import mask_api_new_cpp

from visft_ds.files import MAX_PIXELS

_NAMES = ("image_id", "file_name", "width", "height", "annotations", "captions")
_OF_ANNOTATION = ("id", "bbox", "category_id", "iscrowd", "area")


def parse_label(
    data: bytes, image_id: int, size: tuple[int, int], categories: Collection[int]
) -> dict[str, Any]:
    """The label of an image of this id and `size` (height, width), whose objects are of these category ids.

    Raises:
        ValueError: not JSON, or not as above: a key is missing or a value of another type, the label belongs
            to another image, a category is unknown, a number is not finite or far outside the image, a mask
            is malformed.
    """
    label = orjson.loads(data)
    if not _has(label, _NAMES):
        raise ValueError(f"it must be an object with {', '.join(_NAMES)}")
    height, width = size
    if (label["image_id"], label["height"], label["width"]) != (image_id, height, width):
        raise ValueError(f"it is not the label of image {image_id}, {width} x {height} pixels")
    if min(size) < 1 or height * width > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels; allowed are 1 to {MAX_PIXELS:,} in all")
    if not isinstance(label["file_name"], str):
        raise ValueError("file_name must be text")
    captions = label["captions"]
    if not isinstance(captions, list) or any(type(caption) is not str for caption in captions):
        raise ValueError("captions must be a list of texts")
    annotations = label["annotations"]
    if not isinstance(annotations, list):
        raise ValueError("annotations must be a list")
    for number, annotation in enumerate(annotations, 1):
        problem = _problem(annotation, height, width, categories)
        if problem is not None:
            raise ValueError(f"annotation {number} of {len(annotations)}: {problem}")
    return label


def _has(value: Any, names: Collection[str]) -> bool:
    """Return True for an object with all these keys."""
    return isinstance(value, dict) and all(name in value for name in names)


def _problem(annotation: Any, height: int, width: int, categories: Collection[int]) -> str | None:
    """The first fault of an annotation; None: it has none."""
    if not _has(annotation, _OF_ANNOTATION):
        return f"it must be an object with {', '.join(_OF_ANNOTATION)}"
    if type(annotation["id"]) is not int:
        return "id must be a whole number"
    category = annotation["category_id"]
    if type(category) is not int or category not in categories:
        return f"category_id {category!r:.20} is not among the categories of the split"
    if annotation["iscrowd"] not in (0, 1):
        return "iscrowd must be 0 or 1"
    area = annotation["area"]
    if type(area) not in (int, float) or not math.isfinite(area):
        return "area must be a number"
    box = annotation["bbox"]
    if not is_box(box, height, width):
        return f"bbox {box!r:.60} must be x, y, width and height in pixels of {width} x {height}"
    mask = annotation.get("segmentation")
    if isinstance(mask, dict):
        if not is_run_length_code(mask, height, width):
            return "its run-length code does not fill the image"
    elif isinstance(mask, list):
        if not all(is_polygon(polygon) and is_near(polygon, height, width) for polygon in mask):
            return "a polygon must be x, y, x, y, ... of three points or more, near the image"
    elif mask is not None:
        return "segmentation must be polygons or a run-length code"
    return None


def is_box(box: Any, height: int, width: int) -> bool:
    """Return True for x, y, width and height of a box that is near the image."""
    if not isinstance(box, list) or len(box) != 4:
        return False
    if any(type(number) not in (int, float) for number in box):
        return False
    x, y, across, down = box
    return is_near((x, y, x + across, y + down), height, width)


def is_polygon(polygon: Any) -> bool:
    """Return True for a list of x, y, x, y, ... of three points or more."""
    if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2 == 1:
        return False
    try:
        # the fastest way over many numbers: it fails for text, objects and null
        total = sum(polygon)
        return math.isfinite(total)
    except (TypeError, OverflowError):
        return False


def is_near(coordinates: Any, height: int, width: int) -> bool:
    """Return True if coordinates of an image's objects lie at most one more image away from it.

    What draws and compares polygons takes memory in proportion to their extent.
    """
    side = max(height, width)
    lowest = min(coordinates)
    highest = max(coordinates)
    return bool(-side <= lowest and highest <= 2 * side)


def is_run_length_code(code: Any, height: int, width: int) -> bool:
    """Return True for {"size": [height, width], "counts": text} whose runs fill an image of this size."""
    size = code.get("size")
    counts = code.get("counts")
    if not isinstance(counts, str) or not isinstance(size, list):
        return False
    if size != [height, width] or any(type(side) is not int for side in size):
        return False
    try:
        (runs,) = mask_api_new_cpp.toUncompressedRLE([{"size": size, "counts": counts}])
    except (ValueError, RuntimeError):  # what no encoder writes
        return False
    return bool(sum(runs["counts"]) == height * width)
