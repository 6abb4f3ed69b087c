"""Bilinear interpolation as one matrix along each axis."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def interpolation(cells: int, share: float, pixels: int, like: Tensor) -> Tensor:
    """Matrix (pixels, cells) of linear interpolation from cells to pixels spread over the first `share` of
    the cells.

    As `F.interpolate(mode="bilinear", align_corners=False)`, which can take a whole number of cells only.
    Cells beyond the image have no part in it.
    """
    inside = share * cells
    place = (torch.arange(pixels, device=like.device, dtype=torch.float64) + 0.5) * (inside / pixels) - 0.5
    place = place.clamp(0, math.ceil(inside - 1e-4) - 1)[:, None]
    return (1 - (place - torch.arange(cells, device=like.device)).abs()).clamp(min=0).to(like.dtype)
