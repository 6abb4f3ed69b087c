"""Group norm of padded maps.

Letters: B images, E channels, h w grid.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from visft_ds.ops import at_least_float32

#: Groups of every group norm, as in Mask2Former.
GROUPS = 32


class MaskedGroupNorm(nn.GroupNorm):
    """Group norm whose mean and variance are those of the valid cells."""

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:  # type: ignore[override]
        """x (B, E, h, w), valid (B, h, w) bool, at least one True for each image -> (B, E, h, w), at least
        float32.
        """
        x = at_least_float32(x)
        inside = valid[:, None, None].to(x.dtype)  # (B, 1, 1, h, w)
        grouped = x.unflatten(1, (self.num_groups, -1))
        grouped = grouped * inside
        count = _sum(inside) * grouped.shape[2]
        mean = _sum(grouped) / count
        centred = (grouped - mean) * inside
        variance = _sum(centred.square()) / count
        normed = centred * torch.rsqrt(variance + self.eps)
        normed = normed.flatten(1, 2)
        weight = self.weight[:, None, None]
        bias = self.bias[:, None, None]
        return normed * weight + bias


def _sum(x: Tensor) -> Tensor:
    """Sum over channels and cells of each group: (B, groups, E / groups, h, w) -> (B, groups, 1, 1, 1)."""
    return x.sum(dim=(2, 3, 4), keepdim=True)
