"""COCO segmentations in forms that every reader supports: polygons of three points or more, compressed RLE."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from faster_coco_eval import mask as coco_mask  # pycocotools' own warns under NumPy 2

Found = list[str]  # kinds of `findings.FINDINGS`


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
