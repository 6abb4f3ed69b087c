"""Predictions of tiles -> those of the picture: what several tiles saw of one object becomes one object.

Two tiles can agree only about what both of them show. So boxes of one class from two tiles are one object if
they are nearly the same in the part of the picture that both tiles show: of an object that the first shows
whole and the second in part, and of one that goes beyond the borders of both, and of more tiles.

Letters: n predictions of a picture, T tiles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from faster_coco_eval import mask as coco_mask  # pycocotools' decode() warns under NumPy 2

from visft_ds.data.labels import box_corners
from visft_ds.data.transforms import BoolArray, FloatArray, Size
from visft_ds.settings.tiles import Window
from visft_ds.tasks import Results
from visft_ds.tasks.masks.rasters import encode_runs

Corners = npt.NDArray[np.float64]  # (..., 4) left, top, right, bottom in pixels
#: Intersection of two boxes over their union, above which they are one object; and part of a cut box that
#: another one covers, above which it is no object of its own.
_SAME = 0.5
#: Part of the best score that a box needs to make its object larger: bad guesses reach too far.
LEAST_SURE = 0.5
#: Part of a tile's side: a box that ends so near to a border goes on behind it.
_NEAR = 0.02


def merged(results: Results, windows: Sequence[Window], size: Size) -> Results:
    """Predictions for a picture, from those for its tiles, by confidence.

    Args:
        results: in COCO's results format, with boxes in pixels of the tile whose number is `image_id`.
        windows: the tiles.
        size: (height, width) of the picture.

    Returns:
        the same with boxes and masks of the picture, and without `image_id`.
    """
    boxes = box_corners(results)
    owners = np.array([result["image_id"] for result in results], dtype=np.int64)
    corners = np.array([(window.left, window.top) * 2 for window in windows])
    boxes += corners[owners]
    scores = np.array([result["score"] for result in results], dtype=np.float64)
    labels = np.array([result["category_id"] for result in results], dtype=np.int64)
    objects = Results()
    for group, (left, top, right, bottom) in merge_boxes(boxes, scores, labels, owners, windows, size):
        best = results[group[0]]
        merged_result = {**best, "bbox": [left, top, right - left, bottom - top]}
        del merged_result["image_id"]
        if "segmentation" in best:
            masks = [(results[number]["segmentation"], windows[owners[number]]) for number in group]
            merged_result["segmentation"] = joined_masks(masks, size)
        objects.append(merged_result)
    return objects


def merge_boxes(
    boxes: Corners,
    scores: FloatArray,
    labels: npt.NDArray[np.int64],
    owners: npt.NDArray[np.int64],
    windows: Sequence[Window],
    size: Size,
) -> list[tuple[list[int], list[float]]]:
    """(rows of the boxes of an object, the best first, its corners) of each object, the best first.

    A box that a border of its tile cuts is left out if another tile shows all that it covers and more. Else
    boxes that agree are one object with the score of the best. It reaches as far as those of them that go on
    where the tile of another one ends, from tile to tile, and have half that score.

    Args:
        boxes: (n, 4) corners in pixels of the picture.
        scores: (n,).
        labels: (n,) classes.
        owners: (n,) numbers of their tiles.
        windows: (T) the tiles.
        size: (height, width) of the picture.
    """
    sides = [(left, top, left + width, top + height) for top, left, height, width in windows]
    tiles = np.array(sides, dtype=np.float64)
    picture = np.array([0, 0, size[1], size[0]], dtype=np.float64)
    shown = tiles[owners]
    margin = _NEAR * max(windows[0].height, windows[0].width)
    is_cut = ~_within(boxes, shown, picture, margin)
    left_to_others = np.zeros(len(boxes), dtype=bool)
    for row in np.flatnonzero(is_cut):
        left_to_others[row] = _within(boxes[row], tiles, picture, margin).any()

    objects = []
    remaining = ~left_to_others
    for row in np.argsort(-scores, kind="stable"):
        if not remaining[row]:
            continue
        remaining[row] = False
        group = [int(row)]
        for member in group:  # which grows meanwhile
            rivals = np.flatnonzero(remaining & (labels == labels[row]) & (owners != owners[member]))
            common = _intersection(shown[member], shown[rivals])
            own = _intersection(boxes[member], common)
            others = _intersection(boxes[rivals], common)
            both = _areas(_intersection(own, others))
            agree = both > _SAME * (_areas(own) + _areas(others) - both)
            is_covered = is_cut[rivals] & (both > _SAME * _areas(others))
            goes_on = (
                agree
                & (scores[rivals] >= LEAST_SURE * scores[row])
                & ~_within(boxes[rivals], shown[member], picture, -margin)
            )
            remaining[rivals[agree | is_covered]] = False
            group += rivals[goes_on].tolist()
        corners = np.concatenate([boxes[group, :2].min(axis=0), boxes[group, 2:].max(axis=0)])
        objects.append((group, corners.tolist()))
    return objects


def _within(boxes: Corners, tiles: Corners, picture: Corners, margin: float) -> BoolArray:
    """True for boxes that end at least a margin before each border of a tile, but those of the picture."""
    is_low = (boxes[..., :2] >= tiles[..., :2] + margin) | (tiles[..., :2] <= picture[:2])
    is_high = (boxes[..., 2:] <= tiles[..., 2:] - margin) | (tiles[..., 2:] >= picture[2:])
    return np.asarray((is_low & is_high).all(axis=-1))


def _intersection(first: Corners, second: Corners) -> Corners:
    low = np.maximum(first[..., :2], second[..., :2])
    high = np.minimum(first[..., 2:], second[..., 2:])
    return np.concatenate([low, high], axis=-1)


def _areas(boxes: Corners) -> FloatArray:
    """(...,) areas; 0 of a box whose corners are the wrong way round, as of two that do not meet."""
    areas: FloatArray = (boxes[..., 2:] - boxes[..., :2]).clip(min=0).prod(axis=-1)
    return areas


def joined_masks(masks: Sequence[tuple[Mapping[str, Any], Window]], size: Size) -> dict[str, Any]:
    """Run-length code, in a picture of this height and width, of all that masks of some of its tiles cover.

    The picture is never decoded: it may be larger than the memory.
    """
    height = size[0]
    covered = []  # pixels, counted down the columns as run-length codes do
    for code, window in masks:
        columns, rows = np.nonzero(coco_mask.decode(dict(code)).T)
        covered.append((columns + window.left) * height + rows + window.top)
    pixels = np.sort(np.concatenate(covered), kind="stable")  # in which a pixel may stand several times
    gaps = np.flatnonzero(np.diff(pixels) > 1)
    borders = np.stack((pixels[gaps] + 1, pixels[gaps + 1]), axis=1)
    return encode_runs(np.concatenate([pixels[:1], borders.ravel(), pixels[-1:] + 1]), size)
