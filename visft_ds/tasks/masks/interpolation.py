"""Bilinear interpolation as one matrix along each axis."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def interpolation(cells: int, share: float, pixels: int, like: Tensor) -> Tensor:
    """Matrix (pixels, cells) of linear interpolation from cells to pixels spread over the first `share` of
    the cells.

    As `F.interpolate(mode="bilinear", align_corners=False)`, which can take a whole number of cells only.
    Cells beyond the image have no part in it. The matrix has the device and the dtype of `like`.
    """
    inside = share * cells
    centres = torch.arange(pixels, device=like.device, dtype=torch.float64) + 0.5
    positions = centres * (inside / pixels) - 0.5
    # Shares are float32: a whole number of cells may come out a little larger.
    last_cell = math.ceil(inside - 1e-4) - 1
    positions = positions.clamp(0, last_cell)
    distances = (positions[:, None] - torch.arange(cells, device=like.device)).abs()
    return (1 - distances).clamp(min=0).to(like.dtype)
