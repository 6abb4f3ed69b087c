"""Content of a label: checked when shards are built, and again when read, as shards may come from others.

A label is the JSON file beside an image in a shard:
{"image_id": 139, "file_name": "000000000139.jpg", "width": 640, "height": 426,
 "annotations": [{"id": 1, "bbox": [x, y, width, height], "category_id": 64, "iscrowd": 0, "area": 531.8,
                  "segmentation": [[x, y, x, y, ...], ...] or {"size": [height, width], "counts": ...}}, ...],
 "captions": ["A room with a table.", ...]}
and, of an image with a depth map, "depth" as `data/depth.py` says; with a panoptic map, "panoptic" as
`data/panoptic.py` does.
Of tars that others wrote it may also be a text, which is the caption, or JSON as `_of_others` reads it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

# mask_api_new_cpp is not among its Python names; `decode` costs thirty times as much
from faster_coco_eval import mask as coco_mask
from faster_coco_eval import mask_api_new_cpp

from visft_ds.data.depth import is_depth
from visft_ds.data.panoptic import problem_of
from visft_ds.files import MAX_PIXELS

_NAMES = ("image_id", "file_name", "width", "height", "annotations", "captions")
_OF_ANNOTATION = ("id", "bbox", "category_id", "iscrowd", "area")


def parse_label(
    data: bytes,
    image_id: int,
    size: tuple[int, int],
    categories: Collection[int],
    kind: str = "visft",
    panoptic: Collection[int] = (),
) -> dict[str, Any]:
    """The label of an image of this id and `size` (height, width), whose objects are of these category ids,
    and whose segments of the `panoptic` ones.

    `kind` is one of `shards.LABEL_KINDS`.

    Raises:
        ValueError: not JSON, or not as above: a key is missing or a value of another type, the label belongs
            to another image, a category is unknown, a number is not finite or far outside the image, a mask
            is malformed.
    """
    if kind == "visft":
        label = orjson.loads(data)
    else:
        label = _of_others(data, kind, image_id, size, bool(categories))
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
    if "depth" in label and not is_depth(label["depth"]):
        raise ValueError("depth must be a base64 text png and the metres of a number in it, or null")
    if "panoptic" in label:
        problem = problem_of(label["panoptic"], panoptic)
        if problem is not None:
            raise ValueError(problem)
    annotations = label["annotations"]
    if not isinstance(annotations, list):
        raise ValueError("annotations must be a list")
    for number, annotation in enumerate(annotations, 1):
        problem = _problem(annotation, height, width, categories)
        if problem is not None:
            raise ValueError(f"annotation {number} of {len(annotations)}: {problem}")
    return label


def _of_others(
    data: bytes, kind: str, image_id: int, size: tuple[int, int], has_categories: bool
) -> dict[str, Any]:
    """A label of ours with what other programs wrote beside an image: a text, or JSON.

    Captions of JSON are the texts of `captions`, or that of `caption`; empty ones are left out. Objects are
    `annotations` as COCO lists them, of which id, iscrowd and area may be missing; without categories they
    are not read.
    """
    content: Any = {"caption": data.decode("utf-8-sig")} if kind == "text" else orjson.loads(data)
    if not isinstance(content, dict):
        raise ValueError("it must be an object with caption, captions or annotations")
    listed = content.get("annotations") if has_categories else None
    annotations = []
    for number, annotation in enumerate(listed or [], 1):
        if not _has(annotation, ("bbox", "category_id")) or not is_numbers(annotation["bbox"], 4):
            raise ValueError(f"annotation {number} needs a bbox of four numbers and a category_id")
        _, _, width, height = annotation["bbox"]
        completed = {"id": number, "iscrowd": 0, "area": width * height, **annotation}
        mask = annotation.get("segmentation")
        if isinstance(mask, dict):  # COCO has codes as lists of numbers, too
            completed["segmentation"] = run_length_code(mask, *size) or mask
        annotations.append(completed)
    captions = content.get("captions")
    if captions is None:
        captions = [content.get("caption") or ""]
    if isinstance(captions, list):
        captions = [text.strip() if isinstance(text, str) else text for text in captions]
        captions = [text for text in captions if text != ""]
    return {
        "image_id": image_id,
        "file_name": f"{image_id:012d}",
        "height": size[0],
        "width": size[1],
        "annotations": annotations,
        "captions": captions,
    }


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


def is_numbers(value: Any, count: int) -> bool:
    """Return True for a list of so many numbers."""
    if not isinstance(value, list) or len(value) != count:
        return False
    return all(type(number) in (int, float) for number in value)


def is_box(box: Any, height: int, width: int) -> bool:
    """Return True for x, y, width and height of a box that is near the image."""
    if not is_numbers(box, 4):
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


def run_length_code(mask: Mapping[str, Any], height: int, width: int) -> dict[str, Any] | None:
    """A run-length code with its counts as text; None if it does not fill the image."""
    size = [height, width]
    if mask.get("size") != size:
        return None
    code = {"size": size, "counts": mask.get("counts")}
    if isinstance(code["counts"], list):
        if not all(type(count) is int and count >= 0 for count in code["counts"]):
            return None
        if sum(code["counts"]) != height * width:
            return None
        code["counts"] = coco_mask.frPyObjects(code, height, width)["counts"].decode()
    return code if is_run_length_code(code, height, width) else None


def box_corners(objects: Sequence[Mapping[str, Any]]) -> npt.NDArray[np.float64]:
    """(n, 4) left, top, right and bottom of the boxes of objects, or of results for them."""
    boxes = np.array([entry["bbox"] for entry in objects], dtype=np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return boxes
