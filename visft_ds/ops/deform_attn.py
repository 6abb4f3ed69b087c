"""Deformable attention: every query looks at a few points of a feature map.

Letters: B images, S = h*w cells, Q queries, M heads, c channels of a head, P points.

Zhu et al., "Deformable DETR", arXiv 2010.04159, eq. 2. In plain PyTorch: it runs on every device and in every
floating type that `grid_sample` knows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def deform_attn(value: Tensor, shape: tuple[int, int], locations: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of bilinear samples.

    Args:
        value: (B, S, M, c), the cells of the map row by row.
        shape: (height, width) of the map.
        locations: (B, Q, M, P, 2) x and y in [0, 1] of the map's area; (0, 0) is its outer top left corner.
            Samples outside see zeros.
        weights: (B, Q, M, P), for an attention summing to 1 over P.

    Returns:
        (B, Q, M * c) in the dtype of value.
    """
    batch, _, heads, channels = value.shape
    # Heads are images of their own from here on, as `grid_sample` knows none.
    grids = (2 * locations - 1).transpose(1, 2).flatten(0, 1)  # (B * M, Q, P, 2)
    of_heads = weights.transpose(1, 2).flatten(0, 1)  # (B * M, Q, P)
    maps = value.permute(0, 2, 3, 1).reshape(batch * heads, channels, *shape)
    if torch.compiler.is_exporting():  # TensorRT computes ONNX' GridSample wrong, without a word
        samples = gathered(maps, grids)
    else:
        samples = F.grid_sample(maps, grids, mode="bilinear", padding_mode="zeros", align_corners=False)
    sums = (samples * of_heads.unsqueeze(1)).sum(dim=-1)  # (B * M, c, Q)
    return sums.view(batch, heads * channels, -1).transpose(1, 2)


def gathered(maps: Tensor, grid: Tensor) -> Tensor:
    """`F.grid_sample` of maps (N, c, h, w) at points (N, Q, P, 2) by gathers of four cells: (N, c, Q, P)."""
    channels, height, width = maps.shape[1:]
    cells = maps.flatten(2)
    x = (grid[..., 0] + 1) * (width / 2) - 0.5
    y = (grid[..., 1] + 1) * (height / 2) - 0.5
    samples = torch.zeros_like(maps[..., :1, :1])
    for below in (0, 1):
        for right in (0, 1):
            row = y.floor() + below
            column = x.floor() + right
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            weight = (1 - (x - column).abs()) * (1 - (y - row).abs()) * inside
            index = row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
            index_of_all = index.long().flatten(1)[:, None].expand(-1, channels, -1)
            values = cells.gather(2, index_of_all).unflatten(2, grid.shape[1:3])
            samples = samples + values * weight[:, None]
    return samples
