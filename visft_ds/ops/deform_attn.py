"""Multi-scale deformable attention: every query looks at a few points of each feature level.

Letters: B images, L levels, S = sum of h*w over the levels, Q queries, M heads, c channels of a head, P
points.

Zhu et al., "Deformable DETR", arXiv 2010.04159, eq. 3. In plain PyTorch: it runs on every device and in every
floating type that `grid_sample` knows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def deform_attn(
    value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """Weighted sum of bilinear samples.

    Args:
        value: (B, S, M, c), the levels one after another, each row by row.
        shapes: (height, width) of each level.
        locations: (B, Q, M, L, P, 2) x and y in [0, 1] of each level's area; (0, 0) is its outer top left
        corner.
            Samples outside see zeros.
        weights: (B, Q, M, L, P), for an attention summing to 1 over L and P.

    Returns:
        (B, Q, M * c) in the dtype of value.
    """
    batch, _, heads, channels = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    assert value.shape[1] == sum(h * w for h, w in shapes), (value.shape, shapes)
    assert locations.shape == (batch, queries, heads, len(shapes), points, 2), locations.shape
    grids = (2 * locations - 1).permute(3, 0, 2, 1, 4, 5).flatten(1, 2)  # (L, B*M, Q, P, 2)
    shares = weights.permute(3, 0, 2, 1, 4).flatten(1, 2)  # (L, B*M, Q, P)
    mixed = value.new_zeros(batch * heads, channels, queries)
    parts = value.split([h * w for h, w in shapes], dim=1)
    # Summed level by level, so that the samples of one level only are held besides the graph.
    for part, (height, width), grid, share in zip(parts, shapes, grids, shares, strict=True):
        maps = part.permute(0, 2, 3, 1).reshape(batch * heads, channels, height, width)
        samples = F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        mixed = mixed + (samples * share.unsqueeze(1)).sum(dim=-1)
    return mixed.view(batch, heads * channels, queries).transpose(1, 2)
