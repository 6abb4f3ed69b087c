"""Masks of boxes: a small mask for each box, from the features inside it (after Mask R-CNN, arXiv
1703.06870).

One mask without a class for each box: the box already has one. The mask lies in the box, so that box, mask
and score are one object.

Letters: B images, K boxes of an image, M chosen ones among all B * K, D backbone width, h w grid of a map,
H W pixels of the stored image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visft_ds.data.samples import Map
from visft_ds.data.transforms import Size
from visft_ds.ops import at_least_float32, to_device
from visft_ds.tasks.masks.interpolation import shares_of_cells
from visft_ds.tasks.masks.rasters import encode_mask

CELLS = 14  #: of a box along each axis, where features are read
SIDE = 2 * CELLS  #: cells of a mask along each axis
_SAMPLES = 2  # of features in a cell, along each axis, of which a cell has the mean
_GROUPS = 8  # of group norms
_CONVS = 2


class BoxMasks(nn.Module):
    """Boxes on feature maps -> logits of SIDE x SIDE cells in each.

    Each map is read at CELLS x CELLS places of a box and projected to `width`; their sum goes through a group
    norm, 3x3 convolutions and a transposed one that doubles the grid.
    """

    def __init__(self, widths: Sequence[int], width: int) -> None:
        """A head for maps of these widths."""
        super().__init__()
        self.input_projs = nn.ModuleList(nn.Conv2d(channels, width, kernel_size=1) for channels in widths)
        self.input_norm = nn.GroupNorm(_GROUPS, width)
        convs = [nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(_CONVS)]
        self.convs = nn.ModuleList(convs)
        self.norms = nn.ModuleList(nn.GroupNorm(_GROUPS, width) for _ in convs)
        self.upsample = nn.ConvTranspose2d(width, width, kernel_size=2, stride=2)
        self.mask_embed = nn.Conv2d(width, 1, kernel_size=1)

    def forward(self, maps: Sequence[Map], boxes: Tensor, chosen: Tensor) -> Tensor:
        """Logits (M, SIDE, SIDE), at least float32.

        Args:
            boxes: (B, K, 4) corners relative to the valid image.
            chosen: (M,) int64, places of the boxes that are asked for, among all B * K.
        """
        projected = []
        for map_, project in zip(maps, self.input_projs, strict=True):
            # The projection is linear: behind the reading it has fewer cells than in front of it.
            cells = features_in_boxes(map_, boxes).flatten(0, 1)[chosen]
            projected.append(project(cells))
        x = self.input_norm(torch.stack(projected).sum(0))
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)))
        x = F.relu(self.upsample(x))
        return at_least_float32(self.mask_embed(x))[:, 0]


def features_in_boxes(map_: Map, boxes: Tensor) -> Tensor:
    """(B, K, D, CELLS, CELLS): means of bilinear samples in the cells of each box (B, K, 4).

    As RoIAlign of Mask R-CNN, with one matrix for each axis of a box: a device needs no kernel of its own,
    and cells beyond the image have no part in it.
    """
    features = map_.features
    extents = to_device(map_.cells.to(boxes.dtype), features.device)
    _, width, height_of_map, width_of_map = features.shape
    left, top, right, bottom = boxes.unbind(-1)
    rows = _reading(top, bottom, extents[:, 0], height_of_map).to(features.dtype)
    columns = _reading(left, right, extents[:, 1], width_of_map).to(features.dtype)
    # One product for all boxes of an image: the map is not copied for each of them.
    by_row = rows.flatten(1, 2) @ features.transpose(1, 2).flatten(2)
    by_row = by_row.unflatten(1, (boxes.shape[1], CELLS)).unflatten(-1, (width, width_of_map))
    return by_row.transpose(2, 3) @ columns.transpose(2, 3)[:, :, None]


def _reading(low: Tensor, high: Tensor, extents: Tensor, cells: int) -> Tensor:
    """(B, K, CELLS, cells) weights of a map's cells along an axis in the cells of each box.

    Args:
        low, high: (B, K) ends of the boxes relative to the image.
        extents: (B,) cells of the map that show the image.
    """
    number = CELLS * _SAMPLES
    shares = (torch.arange(number, device=low.device, dtype=low.dtype) + 0.5) / number
    points = low[..., None] + (high - low)[..., None] * shares  # (B, K, number)
    positions = points * extents[:, None, None] - 0.5
    # Extents may come out a little larger than a whole number of cells.
    last_cell = (extents - 1e-4).ceil() - 1
    positions = positions.clamp(min=0).minimum(last_cell[:, None, None])
    return shares_of_cells(positions, cells).unflatten(2, (CELLS, _SAMPLES)).mean(dim=3)


def mask_code(logits: npt.NDArray[np.float32], corners: Sequence[float], size: Size) -> dict[str, Any]:
    """COCO's run-length code of a box's mask at the size (H, W) of the stored image, counts as text.

    A pixel belongs to it if its centre is in the box, and the bilinearly interpolated logit there is above 0.

    Args:
        logits: (SIDE, SIDE) cells of the box.
        corners: left, top, right and bottom of the box in pixels.
    """
    height, width = size
    left, top, right, bottom = corners
    first_row, rows = _pixels(top, bottom, height, len(logits))
    first_column, columns = _pixels(left, right, width, len(logits))
    inside = rows @ logits @ columns.T > 0
    return encode_mask(inside, first_row, first_column, size)


def _pixels(low: float, high: float, pixels: int, cells: int) -> tuple[int, npt.NDArray[np.float32]]:
    """The first pixel of an axis whose centre lies between `low` and `high`, and the weights (n, cells) of a
    mask's cells in it and in the n - 1 after it.
    """
    first = max(0, math.ceil(low - 0.5))
    last = min(pixels - 1, math.floor(high - 0.5))
    centres = np.arange(first, last + 1) + 0.5
    positions = (centres - low) / max(high - low, 1e-6) * cells - 0.5
    positions = positions.clip(0, cells - 1)
    distances = np.abs(positions[:, None] - np.arange(cells))
    return first, (1 - distances).clip(min=0).astype(np.float32)
