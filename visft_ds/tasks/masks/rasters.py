"""Soft masks from COCO segmentations, drawn directly on the grid that a loss needs, inside the object's own
box.

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


def draw_masks(
    segmentations: Sequence[Any], size: Size, ops: Sequence[Op], stride: int, fine: int = _FINE
) -> Mask:
    """(n, hm, wm) uint8: the part of each cell that an object covers, 0 to 255, after `ops` on an image of
    `size`.

    `segmentations` are polygons [[x, y, x, y, ...], ...] or run-length codes {"size", "counts"}, as in COCO.
    """
    after, limit = final_size(size, ops), np.array([size[1], size[0]])
    grid = grid_size(after, stride)
    scale, offset = placement(size, ops) * [
        grid[1] * fine / after[1],
        grid[0] * fine / after[0],
    ]  # to subsamples
    masks = np.zeros((len(segmentations), *grid), dtype=np.uint8)
    for mask, segmentation in zip(masks, segmentations, strict=True):
        code = dict(segmentation) if isinstance(segmentation, Mapping) else None
        if code is not None:
            x, y, width, height = coco_mask.toBbox(code)
            outlines = [np.array([[x, y], [x + width, y + height]])]
        else:  # far outside, the library takes memory in proportion to the distance
            outlines = [np.reshape(polygon, (-1, 2)).clip(-limit, 2 * limit) for polygon in segmentation]
        outlines = [outline * scale + offset for outline in outlines]
        # the cells that the object can touch
        corners = np.concatenate(outlines) / fine
        left, top = np.maximum(np.floor(corners.min(axis=0)), 0).astype(int).tolist()
        right, bottom = np.minimum(np.ceil(corners.max(axis=0)), grid[::-1]).astype(int).tolist()
        if right <= left or bottom <= top:
            continue
        rows, columns = bottom - top, right - left
        if code is None:
            inside = [(outline - [left * fine, top * fine]).ravel().tolist() for outline in outlines]
            samples = coco_mask.decode(
                coco_mask.merge(coco_mask.frPyObjects(inside, rows * fine, columns * fine))
            )
        else:  # the stored pixel under the centre of each subsample
            y = np.floor((np.arange(top * fine, bottom * fine) + 0.5 - offset[1]) / scale[1]).astype(int)
            x = np.floor((np.arange(left * fine, right * fine) + 0.5 - offset[0]) / scale[0]).astype(int)
            shown = ((y >= 0) & (y < size[0]))[:, None] & ((x >= 0) & (x < size[1]))
            samples = coco_mask.decode(code)[np.ix_(y.clip(0, size[0] - 1), x.clip(0, size[1] - 1))] * shown
        counts = (
            samples.T.reshape(columns, fine, rows, fine)
            .sum(axis=1, dtype=np.uint8)
            .sum(axis=2, dtype=np.uint8)
        )
        mask[top:bottom, left:right] = np.rint(counts.T * (255 / fine**2))
    return masks


def decode_mask(segmentation: Any, size: Size) -> npt.NDArray[np.bool_]:
    """A COCO segmentation of an image of `size` as (H, W) bool."""
    return draw_masks([segmentation], size, [], stride=1, fine=1)[0] > 0
