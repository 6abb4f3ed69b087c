"""Soft masks from COCO segmentations, rasterised directly on the grid a loss needs.

The full-size mask is never built: a polygon is moved to where the transforms put it, scaled to a few subsamples per
grid cell, filled inside its own bounding box, and averaged per cell. Cost and memory follow the object, not the image.

Shape letters: hm wm cells of the mask grid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
from faster_coco_eval import mask as coco_mask  # pycocotools' decode() warns under NumPy 2

Size = tuple[int, int]  # (height, width)
FloatArray = npt.NDArray[np.float64]
Mask = npt.NDArray[np.uint8]

#: Subsamples per cell and axis. With cells of 4 pixels, one subsample is one pixel of the transformed image.
SUBSAMPLES = 4


@dataclass(frozen=True)
class MaskPlacement:
    """Map of pixels from the stored to the transformed image: x' = scale_x * x + offset_x, the same for y."""

    scale_x: float = 1.0
    offset_x: float = 0.0
    scale_y: float = 1.0
    offset_y: float = 0.0

    def points(self, points: FloatArray) -> FloatArray:
        """(..., 2) x and y -> (..., 2)."""
        moved: FloatArray = points * [self.scale_x, self.scale_y] + [self.offset_x, self.offset_y]
        return moved


def grid_size(size: Size, stride: int) -> Size:
    """Cells that cover an image of `size` exactly, each at most `stride` pixels high and wide."""
    return -(-size[0] // stride), -(-size[1] // stride)


def rasterise(
    segmentation: Any, stored: Size, placement: MaskPlacement, size: Size, grid: Size, subsamples: int = SUBSAMPLES
) -> Mask:
    """Coverage of each cell by an object: `rasterise_all` of one object, (hm, wm) uint8."""
    mask: Mask = rasterise_all([segmentation], stored, placement, size, grid, subsamples)[0]
    return mask


def rasterise_all(
    segmentations: Sequence[Any],
    stored: Size,
    placement: MaskPlacement,
    size: Size,
    grid: Size,
    subsamples: int = SUBSAMPLES,
) -> Mask:
    """Coverage of each cell by every object of an image.

    Args:
        segmentations: each polygons [[x, y, x, y, ...], ...] or a run-length code {"size", "counts"}, as in COCO.
            Polygons with fewer than three points cover nothing.
        stored: (height, width) of the stored image.
        placement: from there to the transformed image.
        size: (height, width) of the transformed image; what lies outside is cut off.
        grid: (hm, wm) cells over it.
        subsamples: how finely a cell is sampled along each axis; at most 15.

    Returns:
        (n, hm, wm) uint8, 0 nothing to 255 all of the cell.

    Raises:
        ValueError: neither of the two forms; coordinates that are not finite; a code of another image size.
    """
    assert 1 <= subsamples <= 15, "counts of subsamples are kept in 8 bits"
    # from pixels of the transformed image to subsamples
    fine_y, fine_x = grid[0] * subsamples / size[0], grid[1] * subsamples / size[1]
    fine = MaskPlacement(
        placement.scale_x * fine_x, placement.offset_x * fine_x, placement.scale_y * fine_y, placement.offset_y * fine_y
    )
    masks = np.zeros((len(segmentations), *grid), dtype=np.uint8)
    drawn: list[tuple[Mask, Sequence[Any]]] = []
    for mask, segmentation in zip(masks, segmentations, strict=True):
        if isinstance(segmentation, Mapping):
            _draw_code(mask, segmentation, stored, fine, subsamples)
        elif isinstance(segmentation, Sequence) and not isinstance(segmentation, str):
            drawn.append((mask, segmentation))
        else:
            raise ValueError(f"segmentation {segmentation!r:.60} is neither a list of polygons nor a run-length code")
    _draw_polygons(drawn, stored, fine, subsamples)
    return masks


def _draw_polygons(
    drawn: Sequence[tuple[Mask, Sequence[Any]]], stored: Size, fine: MaskPlacement, subsamples: int
) -> None:
    """Fill the polygons of every object into its mask.

    The corners of all objects are moved together: an object has few, and each call of numpy costs as much as a hundred.
    """
    masks: list[Mask] = []
    usable: list[Sequence[float]] = []
    firsts: list[int] = []  # of each object among all polygons
    for mask, polygons in drawn:
        # the library would take two points for a box, and ignores a last number without a partner
        enough = [polygon[: len(polygon) // 2 * 2] for polygon in map(_checked, polygons) if len(polygon) >= 6]
        if enough:
            masks.append(mask)
            firsts.append(len(usable))
            usable += enough
    if not masks:
        return
    lengths = np.array([len(polygon) for polygon in usable], dtype=np.int64)
    ends = np.cumsum(lengths)
    starts = (ends - lengths)[firsts] // 2  # of the points of each object
    # garbage far outside would cost memory in proportion to its distance
    limit = np.array([stored[1], stored[0]])
    points = fine.points(
        np.array(list(chain.from_iterable(usable)), dtype=np.float64).reshape(-1, 2).clip(-limit, 2 * limit)
    )
    low, high = np.minimum.reduceat(points, starts), np.maximum.reduceat(points, starts)
    corner = np.maximum(np.floor(low / subsamples), 0).astype(np.int64)  # (n, 2) x, y of the first cell
    beyond = np.minimum(np.ceil(high / subsamples), masks[0].shape[::-1]).astype(np.int64)
    counts = np.diff(starts, append=len(points))
    flat: list[float] = (points - np.repeat(corner * subsamples, counts, axis=0)).ravel().tolist()
    parts = [flat[end - length : end] for end, length in zip(ends.tolist(), lengths.tolist(), strict=True)]
    lasts = [*firsts[1:], len(parts)]
    for mask, (left, top), (right, bottom), first, last in zip(
        masks, corner.tolist(), beyond.tolist(), firsts, lasts, strict=True
    ):
        if right <= left or bottom <= top:
            continue
        codes = coco_mask.frPyObjects(parts[first:last], (bottom - top) * subsamples, (right - left) * subsamples)
        code = codes[0] if len(codes) == 1 else coco_mask.merge(codes)
        mask[top:bottom, left:right] = _average(coco_mask.decode(code), subsamples)


def _checked(polygon: Any) -> Sequence[float]:
    """The polygon. Raises ValueError for anything but a flat list of finite numbers."""
    try:
        finite = math.isfinite(sum(polygon))  # one look at all of them: a sum is finite where its terms are
    except TypeError:  # what cannot be added is no list of numbers
        finite = False
    if not finite:
        raise ValueError(f"polygon {polygon!r:.60} is not a flat list of finite numbers: x, y, x, y, ...")
    return polygon


def _draw_code(mask: Mask, code: Mapping[str, Any], stored: Size, fine: MaskPlacement, subsamples: int) -> None:
    """Fill a run-length code of the stored image into a mask."""
    if not {"size", "counts"} <= code.keys() or code["size"] not in (list(stored), stored):
        raise ValueError(
            f"run-length code with size {code.get('size')}: it must have counts, and the image's size {list(stored)}"
        )
    try:
        if isinstance(code["counts"], list):
            code = coco_mask.frPyObjects(dict(code), *stored)
        x, y, width, height = (float(number) for number in coco_mask.toBbox(code))
        full = coco_mask.decode(code)
    except (RuntimeError, TypeError) as error:  # of the library, which is C++
        raise ValueError(f"run-length code that cannot be read: {str(error)[:80]}") from error
    corners = fine.points(np.array([[x, y], [x + width, y + height]])) / subsamples
    left, top = (max(0, math.floor(value)) for value in corners.min(axis=0))
    right, bottom = (math.ceil(value) for value in corners.max(axis=0))
    bottom, right = min(bottom, mask.shape[0]), min(right, mask.shape[1])
    if bottom <= top or right <= left or width == 0 or height == 0:
        return
    rows = np.arange(top * subsamples, bottom * subsamples) + 0.5
    columns = np.arange(left * subsamples, right * subsamples) + 0.5
    # the stored pixel under the centre of each subsample
    rows = np.floor((rows - fine.offset_y) / fine.scale_y).astype(np.int64)
    columns = np.floor((columns - fine.offset_x) / fine.scale_x).astype(np.int64)
    picked = full[np.ix_(rows.clip(0, stored[0] - 1), columns.clip(0, stored[1] - 1))]
    inside = ((rows >= 0) & (rows < stored[0]))[:, None] & ((columns >= 0) & (columns < stored[1]))
    mask[top:bottom, left:right] = _average(picked * inside, subsamples)


def _average(fine: Mask, subsamples: int) -> Mask:
    """Subsamples, 0 or 1 -> cells, 0 to 255."""
    # Column by column, as run-length codes are decoded: summing along memory is ten times as fast as across it.
    columns = fine.T.reshape(fine.shape[1] // subsamples, subsamples, fine.shape[0] // subsamples, subsamples)
    part = np.add.reduce(columns, axis=1, dtype=np.uint8)
    count = part[..., 0]
    for place in range(1, subsamples):
        count = count + part[..., place]
    return _shares(subsamples).take(count).T


@cache
def _shares(subsamples: int) -> Mask:
    """Covered subsamples of a cell -> 0 to 255."""
    share = np.arange(subsamples**2 + 1, dtype=np.float32) * (255 / subsamples**2)
    return np.rint(share).astype(np.uint8)
