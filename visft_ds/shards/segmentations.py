"""COCO segmentations in forms that every reader supports: polygons of three points or more, compressed RLE.

Boxes that are not x y width height in pixels are recognised by these masks and by areas. A box that fits its image is
never suspected. Of boxes with two corners, those of large objects and of objects in the lower right half are beyond the
image if they are read as COCO's; of boxes normalised to 0..1, all are within the first pixel.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from faster_coco_eval import mask as coco_mask  # pycocotools' own warns under NumPy 2

Found = list[str]  # kinds of `findings.FINDINGS`
#: Kinds of findings -> what COCO wants instead.
FORMS: Mapping[str, str] = {
    "box looks like x1 y1 x2 y2": "x y width height",
    "box looks normalised to 0..1": "pixels",
}
_SLACK = 2.0  # pixels between a mask and its box, by rounding


def stored_segmentation(given: Any, height: int, width: int) -> tuple[Any, Found]:
    """Convert a segmentation of an image of height x width pixels to its stored form, and list what was found.

    Polygons keep their numbers as given. A run-length encoding (RLE) is stored with its counts as text, which is what
    most readers expect; its runs must be non-negative and sum to height * width.

    Returns:
        (a list of polygons, an RLE or None: there is no mask, kinds of findings).
    """
    if isinstance(given, list):
        return _polygons(given)
    if isinstance(given, Mapping):
        return _code(given, height, width)
    return None, [] if given is None else ["mask malformed"]


def _polygons(given: list[Any]) -> tuple[Any, Found]:
    if not given:
        return given, []
    verdicts = [_polygon(polygon) for polygon in given]
    found = [verdict for verdict in verdicts if verdict is not None]
    if found:
        given = [polygon for polygon, verdict in zip(given, verdicts, strict=True) if verdict is None]
    return given or None, found


def _polygon(polygon: Any) -> str | None:
    """Kind of finding of a polygon that is malformed or has fewer than three points, else None."""
    if not isinstance(polygon, list) or len(polygon) % 2:
        return "polygon malformed"
    try:
        # `sum` is the fastest way over millions of numbers: it fails for text, objects and null.
        finite = math.isfinite(sum(polygon))
    except (TypeError, OverflowError):
        finite = False
    if not finite:
        return "polygon malformed"
    return None if len(polygon) >= 6 else "polygon under three points"


def _code(given: Mapping[str, Any], height: int, width: int) -> tuple[Any, Found]:
    size, counts = given.get("size"), given.get("counts")
    if not isinstance(size, list) or not isinstance(counts, list | str):
        return None, ["mask malformed"]
    if size != [height, width]:
        return None, ["run-length code of another size"]
    runs = counts if isinstance(counts, list) else _runs(counts)
    # Readers in C write as many pixels as the runs say, so that wrong ones must never get into a shard.
    complete = runs is not None and all(type(run) is int and run >= 0 for run in runs) and sum(runs) == height * width
    if not complete:
        return None, ["mask malformed"]
    size = [height, width]  # 480.0 is equal to it, and no number of rows for readers in C
    if isinstance(counts, str):
        return {"size": size, "counts": counts}, []
    code = coco_mask.frPyObjects({"size": size, "counts": counts}, height, width)
    return {"size": size, "counts": code["counts"].decode("ascii")}, ["uncompressed run-length code"]


def _runs(counts: str) -> list[int] | None:
    """Decode the runs of a compressed RLE; None if the text is none.

    Each character holds five bits of a number, the lowest first, and a sixth that says whether more follow; the last
    character's highest bit is the sign. From the fourth run on, the number is the difference to the run two before
    (https://github.com/cocodataset/cocoapi, the description in maskApi.h).
    """
    runs: list[int] = []
    number = shift = 0
    for character in counts:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            return None
        number |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            number -= 1 << shift
        runs.append(number + (runs[-2] if len(runs) > 2 else 0))
        number = shift = 0
    return None if shift else runs


def other_form(bbox: Sequence[float], height: int, width: int, area: float | None, segmentation: Any) -> str | None:
    """The kind of finding for a box that is of another form, None for one that may be what it should.

    Args:
        bbox: four numbers, as x y width height beyond the image or within its first pixel.
        height, width: of the image.
        area: of the object, if it is known.
        segmentation: as `stored_segmentation` gives it.
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
