"""Soft masks from COCO segmentations, rasterised directly on the grid a loss needs.

The full-size mask is never built: a polygon is moved to where the transforms put it, scaled to a few subsamples per
grid cell, filled inside its own bounding box, and averaged per cell. Cost and memory follow the object, not the image.

Shape letters: hm wm cells of the mask grid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
class Placement:
    """Where the transforms put a pixel of the stored image: x' = scale_x * x + offset_x, the same for y."""

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
    segmentation: Any, stored: Size, placement: Placement, size: Size, grid: Size, subsamples: int = SUBSAMPLES
) -> Mask:
    """How much of each cell an object covers.

    Args:
        segmentation: polygons [[x, y, x, y, ...], ...] or a run-length code {"size", "counts"}, as in COCO. Polygons
            with fewer than three points cover nothing.
        stored: (height, width) of the stored image.
        placement: from there to the transformed image.
        size: (height, width) of the transformed image; what lies outside is cut off.
        grid: (hm, wm) cells over it.
        subsamples: how finely a cell is sampled along each axis.

    Returns:
        (hm, wm) uint8, 0 nothing to 255 all of the cell.

    Raises:
        ValueError: neither of the two forms; coordinates that are not finite; a code of another image size.
    """
    # from pixels of the transformed image to subsamples
    fine_y, fine_x = grid[0] * subsamples / size[0], grid[1] * subsamples / size[1]
    fine = Placement(
        placement.scale_x * fine_x, placement.offset_x * fine_x, placement.scale_y * fine_y, placement.offset_y * fine_y
    )
    if isinstance(segmentation, Mapping):
        return _from_code(segmentation, stored, fine, grid, subsamples)
    if isinstance(segmentation, Sequence) and not isinstance(segmentation, str):
        return _from_polygons(segmentation, stored, fine, grid, subsamples)
    raise ValueError(f"segmentation {segmentation!r:.60} is neither a list of polygons nor a run-length code")


def _from_polygons(polygons: Sequence[Any], stored: Size, fine: Placement, grid: Size, subsamples: int) -> Mask:
    moved = []
    for polygon in polygons:
        # the library would take two points for a box, and ignores a last number without a partner
        numbers = np.asarray(polygon, dtype=np.float64)
        if numbers.ndim != 1 or not np.isfinite(numbers).all():
            raise ValueError(f"polygon {polygon!r:.60} is not a flat list of finite numbers: x, y, x, y, ...")
        points = numbers[: len(numbers) // 2 * 2].reshape(-1, 2)
        if len(points) >= 3:
            # garbage far outside would cost memory in proportion to its distance
            limit = np.array([stored[1], stored[0]])
            moved.append(fine.points(points.clip(-limit, 2 * limit)))
    if not moved:
        return np.zeros(grid, dtype=np.uint8)
    every = np.concatenate(moved)
    window = _Window.around(every.min(axis=0), every.max(axis=0), grid, subsamples)
    if window.empty:
        return np.zeros(grid, dtype=np.uint8)
    origin = [window.left * subsamples, window.top * subsamples]
    height, width = window.height * subsamples, window.width * subsamples
    codes = coco_mask.frPyObjects([(points - origin).ravel().tolist() for points in moved], height, width)
    return window.average(coco_mask.decode(coco_mask.merge(codes)), grid, subsamples)


def _from_code(code: Mapping[str, Any], stored: Size, fine: Placement, grid: Size, subsamples: int) -> Mask:
    if not {"size", "counts"} <= code.keys() or tuple(code["size"]) != stored:
        raise ValueError(
            f"run-length code with size {code.get('size')}: it must have counts, and the image's size {list(stored)}"
        )
    if isinstance(code["counts"], list):
        code = coco_mask.frPyObjects(dict(code), *stored)
    x, y, width, height = (float(number) for number in coco_mask.toBbox(code))
    corners = fine.points(np.array([[x, y], [x + width, y + height]]))
    window = _Window.around(corners.min(axis=0), corners.max(axis=0), grid, subsamples)
    if window.empty or width == 0 or height == 0:
        return np.zeros(grid, dtype=np.uint8)
    full = coco_mask.decode(code)
    rows = np.arange(window.top * subsamples, (window.top + window.height) * subsamples) + 0.5
    columns = np.arange(window.left * subsamples, (window.left + window.width) * subsamples) + 0.5
    # the stored pixel under the centre of each subsample
    rows = np.floor((rows - fine.offset_y) / fine.scale_y).astype(np.int64)
    columns = np.floor((columns - fine.offset_x) / fine.scale_x).astype(np.int64)
    picked = full[np.ix_(rows.clip(0, stored[0] - 1), columns.clip(0, stored[1] - 1))]
    inside = ((rows >= 0) & (rows < stored[0]))[:, None] & ((columns >= 0) & (columns < stored[1]))
    return window.average(picked * inside, grid, subsamples)


@dataclass(frozen=True)
class _Window:
    """A rectangle of cells."""

    top: int
    left: int
    height: int
    width: int

    @classmethod
    def around(cls, low: FloatArray, high: FloatArray, grid: Size, subsamples: int) -> _Window:
        """The cells that the box from `low` to `high` (x, y in subsamples) touches."""
        left, top = (max(0, math.floor(value / subsamples)) for value in low)
        right, bottom = (math.ceil(value / subsamples) for value in high)
        return cls(top, left, min(bottom, grid[0]) - top, min(right, grid[1]) - left)

    @property
    def empty(self) -> bool:
        """Whether the box lies outside the grid or has no extent."""
        return self.height <= 0 or self.width <= 0

    def average(self, fine: Mask, grid: Size, subsamples: int) -> Mask:
        """Subsamples of the window, 0 or 1 -> the whole grid, 0 to 255."""
        blocks = fine.reshape(self.height, subsamples, self.width, subsamples)
        share = blocks.sum(axis=(1, 3), dtype=np.float32) * (255 / subsamples**2)
        mask = np.zeros(grid, dtype=np.uint8)
        mask[self.top : self.top + self.height, self.left : self.left + self.width] = np.rint(share)
        return mask
