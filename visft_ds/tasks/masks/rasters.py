"""Soft masks from COCO segmentations, drawn directly on the grid that a loss needs, inside the object's own
box.

Shape letters: n objects of an image, hm wm cells of the mask grid, H W pixels of an image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from faster_coco_eval import mask as coco_mask  # pycocotools' decode() warns under NumPy 2
from faster_coco_eval import mask_api_new_cpp

from visft_ds.data.transforms import BoolArray, Crop, Flip, FloatArray, Op, Resize, Size, final_size

Mask = npt.NDArray[np.uint8]
#: Pixels per cell of a target mask, along each axis. With 4, the dice loss of a good prediction is 0.5 %
#: higher than with masks of full size and its cross-entropy 2 % (8 pixels: 1.8 % and 10 %), at 40 times less
#: work.
STRIDE = 4
_SAMPLES = 4  # in a cell, along each axis


def grid_size(size: Size, stride: int) -> Size:
    """Cells that cover an image of `size`, each at most `stride` pixels high and wide."""
    return -(-size[0] // stride), -(-size[1] // stride)


def placement(size: Size, ops: Sequence[Op]) -> FloatArray:
    """((scale x, y), (offset x, y)) from pixels of an image of `size` to those after `ops`."""
    scale = np.ones(2)
    offset = np.zeros(2)
    for op in ops:
        if isinstance(op, Flip):
            scale[0] = -scale[0]
            offset[0] = size[1] - offset[0]
        elif isinstance(op, Resize):
            factor = np.array([op.width / size[1], op.height / size[0]])
            scale = scale * factor
            offset = offset * factor
        elif isinstance(op, Crop):
            offset = offset - [op.left, op.top]
        size = final_size(size, [op])
    return np.stack([scale, offset])


def draw_masks(
    segmentations: Sequence[Any],
    size: Size,
    ops: Sequence[Op],
    stride: int,
    samples: int = _SAMPLES,
) -> Mask:
    """(n, hm, wm) uint8: the part of each cell that an object covers, 0 to 255, after `ops` on an image of
    `size`.

    `segmentations` are polygons [[x, y, x, y, ...], ...] or run-length codes {"size", "counts"}, as in COCO.
    A cell has `samples` x `samples` of them.
    """
    height, width = final_size(size, ops)
    grid = grid_size((height, width), stride)
    samples_per_pixel = [grid[1] * samples / width, grid[0] * samples / height]
    scale, offset = placement(size, ops) * samples_per_pixel
    canvas = _Canvas(size, grid, samples, scale, offset)
    masks = np.zeros((len(segmentations), *grid), dtype=np.uint8)
    for mask, segmentation in zip(masks, segmentations, strict=True):
        canvas.draw(mask, segmentation)
    return masks


def draw_in_boxes(
    segmentations: Sequence[Any], boxes: FloatArray, size: Size, ops: Sequence[Op], side: int
) -> Mask:
    """(n, side, side) uint8: as `draw_masks`, each mask in the cells of its own box.

    `boxes` (n, 4) are left, top, right and bottom in pixels after `ops`; each has an area.
    """
    scale, offset = placement(size, ops)
    masks = np.zeros((len(segmentations), side, side), dtype=np.uint8)
    for mask, segmentation, box in zip(masks, segmentations, boxes, strict=True):
        low = box[:2]
        samples_per_pixel = side * _SAMPLES / (box[2:] - low)
        origin = (offset - low) * samples_per_pixel
        canvas = _Canvas(size, (side, side), _SAMPLES, scale * samples_per_pixel, origin)
        canvas.draw(mask, segmentation)
    return masks


def decode_mask(segmentation: Any, size: Size) -> BoolArray:
    """A COCO segmentation of an image of `size` as (H, W) bool."""
    return draw_masks([segmentation], size, [], stride=1, samples=1)[0] > 0


def encode_mask(inside: BoolArray, top: int, left: int, size: Size) -> dict[str, Any]:
    """COCO's run-length code, counts as text, of a mask (h, w) that lies at `top` and `left` in an image of
    `size` and is empty elsewhere.
    """
    height = size[0]
    rows, columns = inside.shape
    # Codes go down columns; only those of the mask are looked at.
    covered = np.zeros((columns, height), dtype=bool)
    covered[:, top : top + rows] = inside.T
    borders = np.flatnonzero(np.diff(covered.ravel(), prepend=False, append=False)) + left * height
    return encode_runs(borders, size)


def encode_runs(borders: npt.NDArray[np.int64], size: Size) -> dict[str, Any]:
    """COCO's run-length code, counts as text, of a mask of `size`: the pixels, counted down its columns, from
    each first of two borders up to the second.
    """
    height, width = size
    counts = np.diff(borders, prepend=0, append=height * width)
    code = coco_mask.frPyObjects({"size": [height, width], "counts": counts.tolist()}, height, width)
    return {"size": [height, width], "counts": code["counts"].decode("ascii")}


def _decode_columns(code: Mapping[str, Any], first: int, count: int) -> Mask:
    """(H, count) 0 and 1: columns of a run-length code from `first` on. All of it would cost four times as
    much for an object of usual size.
    """
    height = code["size"][0]
    (runs,) = mask_api_new_cpp.toUncompressedRLE([code])
    ends = (np.cumsum(runs["counts"]) - first * height).clip(0, count * height)
    values = np.arange(len(ends), dtype=np.uint8) % 2  # runs of 0 and 1 take turns
    return np.repeat(values, np.diff(ends, prepend=0)).reshape(count, height).T


@dataclass(frozen=True)
class _Canvas:
    """A grid of cells with `samples` x `samples` samples each, and where the pixels of an image lie on it."""

    size: Size  #: of the image, pixels
    grid: Size  #: cells
    samples: int
    scale: FloatArray  #: (x, y), from pixels to samples
    offset: FloatArray

    def draw(self, mask: Mask, segmentation: Any) -> None:
        """Fill the cells of `mask` that polygons or a run-length code of the image cover."""
        if isinstance(segmentation, Mapping):
            self.draw_code(mask, dict(segmentation))
        else:
            self.draw_polygons(mask, segmentation)

    def draw_polygons(self, mask: Mask, polygons: Sequence[Sequence[float]]) -> None:
        """Fill the cells of `mask` that polygons in pixels of the image cover."""
        outlines = [self._outline(polygon) for polygon in polygons]
        rows, columns = self._cells_around(np.concatenate(outlines))
        if _is_empty(rows) or _is_empty(columns):
            return
        side = self.samples
        origin = [columns.start * side, rows.start * side]
        height = rows.stop - rows.start
        width = columns.stop - columns.start
        inside = [(outline - origin).ravel().tolist() for outline in outlines]
        codes = coco_mask.frPyObjects(inside, height * side, width * side)
        covered = coco_mask.decode(coco_mask.merge(codes))
        # The library's arrays go down columns.
        by_cell = covered.T.reshape(width, side, height, side)
        counts = by_cell.sum(axis=1, dtype=np.uint8).sum(axis=2, dtype=np.uint8)
        mask[rows, columns] = np.rint(counts.T / side**2 * 255)

    def draw_code(self, mask: Mask, code: dict[str, Any]) -> None:
        """Fill the cells of `mask` that a run-length code of the image covers.

        A cell has the area of the code's pixels in it. Samples would move the mask: one on the border of two
        pixels would always take the same of them.
        """
        x, y, width, height = map(int, coco_mask.toBbox(code))
        corners = np.array([[x, y], [x + width, y + height]])
        rows, columns = self._cells_around(corners * self.scale + self.offset)
        if _is_empty(rows) or _is_empty(columns) or not width:
            return
        pixels = _decode_columns(code, x, width)[y : y + height]
        by_row = _sums_between(self._edges(rows, axis=1) - y, pixels)
        by_column = _sums_between(self._edges(columns, axis=0) - x, by_row.T)
        pixels_per_cell = self.samples**2 / abs(self.scale.prod())
        mask[rows, columns] = np.rint(by_column.T / pixels_per_cell * 255)

    def _outline(self, polygon: Sequence[float]) -> FloatArray:
        """(n, 2) corners in samples of a polygon in pixels."""
        height, width = self.size
        limit = np.array([width, height])
        # Far outside, the library takes memory in proportion to the distance.
        corners = np.reshape(polygon, (-1, 2)).clip(-limit, 2 * limit)
        return corners * self.scale + self.offset

    def _cells_around(self, points: FloatArray) -> tuple[slice, slice]:
        """Rows and columns of the grid around points (x, y) in samples."""
        rows, columns = self.grid
        first = np.floor(points.min(axis=0) / self.samples)
        last = np.ceil(points.max(axis=0) / self.samples)
        left, top = first.astype(int).tolist()
        right, bottom = last.astype(int).tolist()
        return slice(max(top, 0), min(bottom, rows)), slice(max(left, 0), min(right, columns))

    def _edges(self, cells: slice, axis: int) -> FloatArray:
        """Borders of these cells along x (axis 0) or y (1), in pixels of the image."""
        edges = np.arange(cells.start, cells.stop + 1) * self.samples
        return np.asarray((edges - self.offset[axis]) / self.scale[axis])


def _sums_between(edges: FloatArray, values: npt.NDArray[Any]) -> FloatArray:
    """(n, ...) sums of `values` along their first axis between n + 1 neighbouring `edges`, which may fall
    or rise; an entry counts by its share between two of them, and beyond the ends there is nothing.
    """
    sums = np.zeros((len(values) + 1, *values.shape[1:]))
    np.cumsum(values, axis=0, out=sums[1:])
    edges = edges.clip(0, len(values))
    entries = np.minimum(edges.astype(int), len(values) - 1)
    shares = edges - entries
    up_to_edges = sums[entries] + shares[:, None] * values[entries]
    return np.asarray(abs(np.diff(up_to_edges, axis=0)))


def _is_empty(cells: slice) -> bool:
    return cells.stop <= cells.start
