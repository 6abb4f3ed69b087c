"""Boxes that are not x y width height in pixels, recognised by their masks and areas.

A box that fits its image is never suspected. Of boxes with two corners, those of large objects and of objects in the
lower right half are beyond the image if they are read as COCO's; of boxes normalised to 0..1, all are within the first
pixel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from faster_coco_eval import mask as coco_mask  # pycocotools' own warns under NumPy 2

#: Kinds of findings -> what COCO wants instead.
FORMS: Mapping[str, str] = {
    "box looks like x1 y1 x2 y2": "x y width height",
    "box looks normalised to 0..1": "pixels",
}
_SLACK = 2.0  # pixels between a mask and its box, by rounding


def other_form(bbox: Sequence[float], height: int, width: int, area: float | None, segmentation: Any) -> str | None:
    """The kind of finding for a box that is of another form, None for one that may be what it should.

    Args:
        bbox: four numbers, as x y width height beyond the image or within its first pixel.
        height, width: of the image.
        area: of the object, if it is known.
        segmentation: as `segmentations.stored_segmentation` gives it.
    """
    left, top, third, fourth = bbox
    extent = _extent(segmentation)
    if min(bbox) >= 0 and max(bbox) <= 1 and third and fourth:
        pixel = all(float(value).is_integer() for value in bbox) and max(area or 0, *(extent or (0,))) <= _SLACK
        return None if pixel else "box looks normalised to 0..1"
    corners = 0 <= left < third <= width + _SLACK and 0 <= top < fourth <= height + _SLACK
    if not corners or (area or 0) > (third - left + _SLACK) * (fourth - top + _SLACK):
        return None
    if extent is not None:
        x1, y1, x2, y2 = extent
        if min(x1 - left, y1 - top, third - x2, fourth - y2) < -_SLACK:
            return None
    return "box looks like x1 y1 x2 y2"


def _extent(segmentation: Any) -> tuple[float, float, float, float] | None:
    """(x1, y1, x2, y2) of a mask, None where there is none."""
    if not segmentation:
        return None
    if isinstance(segmentation, Mapping):
        x, y, width, height = map(float, coco_mask.toBbox(dict(segmentation)))
        return (x, y, x + width, y + height) if width and height else None
    xs = [x for polygon in segmentation for x in polygon[::2]]
    ys = [y for polygon in segmentation for y in polygon[1::2]]
    return min(xs), min(ys), max(xs), max(ys)
