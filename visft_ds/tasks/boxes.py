"""Boxes: two formats and a measure of overlap, for any leading shape.

`centers` are (cx, cy, w, h), `corners` are (x0, y0, x1, y1); any unit, last axis 4. The measure pairs boxes by
broadcasting: (N, 4) with (N, 4) compares row by row, (N, 1, 4) with (M, 4) gives every pair. `torchvision.ops` has the
pairwise measure and serves as oracle in the tests; it is not used here because its row-by-row loss indexes with a
boolean mask, which makes the host wait for the device in every decoder layer, and because its pairwise measure divides
0 by 0 for two boxes without area.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import box_convert

# Areas and unions are divided by no less than this. Relative boxes of one pixel in a million pixels have area 1e-6 and
# are far from it, so that only boxes without any area are affected; their overlap is 0 instead of NaN.
_SMALLEST_AREA = 1e-12


def centers_to_corners(boxes: Tensor) -> Tensor:
    """(..., 4) cxcywh -> (..., 4) xyxy, same unit."""
    corners: Tensor = box_convert(boxes, in_fmt="cxcywh", out_fmt="xyxy")
    return corners


def generalized_box_iou(first: Tensor, second: Tensor) -> Tensor:
    """Generalized IoU of corner boxes paired by broadcasting, in (-1, 1].

    Rezatofighi et al., arXiv 1902.09630, algorithm 1: IoU minus the share of the smallest enclosing box that neither
    box covers. Finite for boxes without area.
    """
    overlap = torch.minimum(first[..., 2:], second[..., 2:]) - torch.maximum(first[..., :2], second[..., :2])
    intersection = overlap.clamp(min=0).prod(dim=-1)
    areas = [(boxes[..., 2:] - boxes[..., :2]).prod(dim=-1) for boxes in (first, second)]
    union = areas[0] + areas[1] - intersection
    low = torch.minimum(first[..., :2], second[..., :2])
    high = torch.maximum(first[..., 2:], second[..., 2:])
    hull = (high - low).prod(dim=-1)
    iou = intersection / union.clamp(min=_SMALLEST_AREA)
    return iou - (hull - union) / hull.clamp(min=_SMALLEST_AREA)
