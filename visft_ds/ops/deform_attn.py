"""Multi-scale deformable attention: every query looks at a few points of each feature level.

Letters: B images, L levels, S = sum of h*w over the levels, Q queries, M heads, c channels of a head, P
points.

Zhu et al., "Deformable DETR", arXiv 2010.04159, eq. 3. In plain PyTorch: it runs on every device and in every
floating type that `grid_sample` knows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def deform_attn(
    value: Tensor,
    shapes: Sequence[tuple[int, int]],
    locations: Tensor,
    weights: Tensor,
) -> Tensor:
    """Weighted sum of bilinear samples.

    Args:
        value: (B, S, M, c), the levels one after another, each row by row.
        shapes: (height, width) of each level.
        locations: (B, Q, M, L, P, 2) x and y in [0, 1] of each level's area; (0, 0) is its outer top left
            corner. Samples outside see zeros.
        weights: (B, Q, M, L, P), for an attention summing to 1 over L and P.

    Returns:
        (B, Q, M * c) in the dtype of value.
    """
    batch, _, heads, channels = value.shape
    queries = locations.shape[1]
    points = locations.shape[4]
    areas = [height * width for height, width in shapes]
    assert value.shape[1] == sum(areas), (value.shape, shapes)
    assert locations.shape == (batch, queries, heads, len(shapes), points, 2), locations.shape
    # Heads are images of their own from here on, as `grid_sample` knows none.
    from_minus_1_to_1 = 2 * locations - 1
    grids = from_minus_1_to_1.permute(3, 0, 2, 1, 4, 5)  # (L, B, M, Q, P, 2)
    grids = grids.flatten(1, 2)
    level_weights = weights.permute(3, 0, 2, 1, 4)  # (L, B, M, Q, P)
    level_weights = level_weights.flatten(1, 2)
    levels = value.split(areas, dim=1)
    total = value.new_zeros(batch * heads, channels, queries)
    # Summed level by level, so that the samples of one level only are held besides the graph.
    for number, (height, width) in enumerate(shapes):
        level = levels[number]
        of_heads = level.permute(0, 2, 3, 1)
        maps = of_heads.reshape(batch * heads, channels, height, width)
        if torch.compiler.is_exporting():  # TensorRT computes ONNX' GridSample wrong, without a word
            samples = gathered(maps, grids[number])
        else:
            samples = F.grid_sample(
                maps, grids[number], mode="bilinear", padding_mode="zeros", align_corners=False
            )
        weighted = samples * level_weights[number].unsqueeze(1)
        total = total + weighted.sum(dim=-1)
    return total.view(batch, heads * channels, queries).transpose(1, 2)


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
