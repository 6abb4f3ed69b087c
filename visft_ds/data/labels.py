"""The label of a sample: the JSON file beside each image in a shard.

{"image_id": 139, "file_name": "000000000139.jpg", "width": 640, "height": 426,
 "annotations": [{"id": 1, "bbox": [x, y, width, height], "category_id": 64, "iscrowd": 0, "area": 531.8,
                  "segmentation": [[x, y, x, y, ...], ...] or {"size": [height, width], "counts": ...}}, ...],
 "captions": ["A room with a table.", ...]}
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def has_area(bbox: Sequence[float], width: int, height: int) -> bool:
    """Return True if a part of a box (left, top, width, height) with an area lies inside an image of this size."""
    left, top, wide, high = bbox
    return min(left + wide, width) > max(left, 0) and min(top + high, height) > max(top, 0)


def whole_image(size: tuple[int, int], category: int) -> dict[str, Any]:
    """An annotation that fills an image of `size`, (height, width)."""
    height, width = size
    outline = [0, 0, width, 0, width, height, 0, height]
    return {"bbox": [0, 0, width, height], "category_id": category, "iscrowd": 0, "segmentation": [outline]}
