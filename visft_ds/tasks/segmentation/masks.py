"""Soft masks from COCO segmentations, drawn directly on the grid that a loss needs, inside the object's own box.

Shape letters: hm wm cells of the mask grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from faster_coco_eval import mask as coco_mask  # pycocotools' decode() warns under NumPy 2

from visft_ds.data.transforms import Crop, Flip, Op, Resize, Size, final_size

Mask = npt.NDArray[np.uint8]
_FINE = 4  # subsamples of a cell along each axis


def grid_size(size: Size, stride: int) -> Size:
    """Cells that cover an image of `size`, each at most `stride` pixels high and wide."""
    return -(-size[0] // stride), -(-size[1] // stride)


def placement(size: Size, ops: Sequence[Op]) -> npt.NDArray[np.float64]:
    """((scale x, y), (offset x, y)) from pixels of an image of `size` to those after `ops`."""
    scale, offset = np.ones(2), np.zeros(2)
    for op in ops:
        if isinstance(op, Flip):
            scale[0], offset[0] = -scale[0], size[1] - offset[0]
        elif isinstance(op, Resize):
            factor = np.array([op.width / size[1], op.height / size[0]])
            scale, offset = scale * factor, offset * factor
        elif isinstance(op, Crop):
            offset = offset - [op.left, op.top]
        size = final_size(size, [op])
    return np.stack([scale, offset])


def draw_masks(segmentations: Sequence[Any], size: Size, ops: Sequence[Op], stride: int, fine: int = _FINE) -> Mask:
    """(n, hm, wm) uint8: the part of each cell that an object covers, 0 to 255, after `ops` on an image of `size`.

    `segmentations` are polygons [[x, y, x, y, ...], ...] or run-length codes {"size", "counts"}, as in COCO.
    """
    after = final_size(size, ops)
    grid = grid_size(after, stride)
    to_fine = placement(size, ops) * [grid[1] * fine / after[1], grid[0] * fine / after[0]]
    masks = np.zeros((len(segmentations), *grid), dtype=np.uint8)
    for mask, segmentation in zip(masks, segmentations, strict=True):
        draw = _draw_code if isinstance(segmentation, Mapping) else _draw_polygons
        draw(mask, segmentation, size, to_fine, fine)
    return masks


def decode_mask(segmentation: Any, size: Size) -> npt.NDArray[np.bool_]:
    """A COCO segmentation of an image of `size` as (H, W) bool."""
    return draw_masks([segmentation], size, [], stride=1, fine=1)[0] > 0


def _draw_polygons(mask: Mask, polygons: Sequence[Sequence[float]], size: Size, to_fine: Any, fine: int) -> None:
    limit = np.array([size[1], size[0]])  # far outside, the library takes memory in proportion to the distance
    moved = [np.reshape(one, (-1, 2)).clip(-limit, 2 * limit) * to_fine[0] + to_fine[1] for one in polygons]
    every = np.concatenate(moved)
    if (window := _window(every.min(axis=0), every.max(axis=0), mask, fine)) is None:
        return
    top, bottom, left, right = window
    inside = [(one - [left * fine, top * fine]).ravel().tolist() for one in moved]
    code = coco_mask.merge(coco_mask.frPyObjects(inside, (bottom - top) * fine, (right - left) * fine))
    mask[top:bottom, left:right] = _average(coco_mask.decode(code), fine)


def _draw_code(mask: Mask, code: Mapping[str, Any], size: Size, to_fine: Any, fine: int) -> None:
    x, y, width, height = coco_mask.toBbox(dict(code))
    corners = np.array([[x, y], [x + width, y + height]]) * to_fine[0] + to_fine[1]
    if (window := _window(corners.min(axis=0), corners.max(axis=0), mask, fine)) is None:
        return
    top, bottom, left, right = window
    # the stored pixel under the centre of each subsample
    rows = np.floor((np.arange(top * fine, bottom * fine) + 0.5 - to_fine[1, 1]) / to_fine[0, 1]).astype(int)
    columns = np.floor((np.arange(left * fine, right * fine) + 0.5 - to_fine[1, 0]) / to_fine[0, 0]).astype(int)
    inside = ((rows >= 0) & (rows < size[0]))[:, None] & ((columns >= 0) & (columns < size[1]))
    picked = coco_mask.decode(dict(code))[np.ix_(rows.clip(0, size[0] - 1), columns.clip(0, size[1] - 1))]
    mask[top:bottom, left:right] = _average(picked * inside, fine)


def _window(low: Any, high: Any, mask: Mask, fine: int) -> tuple[int, int, int, int] | None:
    """(top, bottom, left, right) of the cells between two corners (x, y) in subsamples; None for none."""
    left, top = np.maximum(np.floor(low / fine), 0).astype(int).tolist()
    right, bottom = np.minimum(np.ceil(high / fine), mask.shape[::-1]).astype(int).tolist()
    return (top, bottom, left, right) if right > left and bottom > top else None


def _average(samples: Mask, fine: int) -> Mask:
    """Subsamples, 0 or 1 -> cells, 0 to 255."""
    height, width = samples.shape[0] // fine, samples.shape[1] // fine
    counts = samples.T.reshape(width, fine, height, fine).sum(axis=1, dtype=np.uint8).sum(axis=2, dtype=np.uint8)
    return np.rint(counts.T * (255 / fine**2)).astype(np.uint8)
