"""Bilinear interpolation as one matrix along each axis."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def interpolated(maps: Tensor, extent: Sequence[float], size: Sequence[int]) -> Tensor:
    """Maps (..., h, w), of which the shares `extent` (height, width) show image, at a size in pixels:
    (..., H, W).
    """
    rows = interpolation(maps.shape[-2], extent[0], size[0], maps)
    columns = interpolation(maps.shape[-1], extent[1], size[1], maps)
    return rows @ maps @ columns.T


def interpolation(
    cells: int,
    share: float,
    pixels: int,
    like: Tensor,
) -> Tensor:
    """Matrix (pixels, cells) of linear interpolation from cells to pixels spread over the first `share` of
    the cells.

    As `F.interpolate(mode="bilinear", align_corners=False)`, which can take a whole number of cells only.
    Cells beyond the image have no part in it. The matrix has the device and the dtype of `like`.
    """
    inside = share * cells
    pixel_centres = torch.arange(pixels, device=like.device).double() + 0.5
    positions = pixel_centres * (inside / pixels) - 0.5
    # Shares are float32: a whole number of cells may come out a little larger.
    last_cell = math.ceil(inside - 1e-4) - 1
    positions = positions.clamp(0, last_cell)
    return shares_of_cells(positions, cells).to(like.dtype)


def shares_of_cells(positions: Tensor, cells: int) -> Tensor:
    """(..., cells) weights of cells, whose centres are at 0, 1, ..., in linear interpolation at positions."""
    centres = torch.arange(cells, device=positions.device, dtype=positions.dtype)
    distances = (positions[..., None] - centres).abs()
    return (1 - distances).clamp(min=0)
