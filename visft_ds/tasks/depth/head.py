"""Heads of depth.

Letters: B images, h w grid, N bins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from visft_ds.data.samples import Map
from visft_ds.tasks.depth.config import DepthHeadConfig
from visft_ds.tasks.linear import LinearMaps

_LEAST = 0.1  # weight of a bin, before all are divided by their sum (AdaBins, arXiv 2011.14141)


@dataclass(frozen=True)
class DepthOutput:
    """Prediction for a batch."""

    metres: Tensor  #: (B, h, w) over the padded batch, at least float32
    extents: Tensor  #: (B, 2) on the host, height and width of each image as a share of (h, w)
    relative: bool = False  #: their inverses are of any scale and offset, as the maps that taught them


def metres_of(scores: Tensor, nearest: float, farthest: float) -> Tensor:
    """Mean (..., h, w) of evenly spaced depths, weighted by scores (..., N, h, w)."""
    weights = torch.relu(scores) + _LEAST
    bins = torch.linspace(nearest, farthest, scores.shape[-3], device=scores.device, dtype=scores.dtype)
    return torch.einsum("...nhw,n->...hw", weights, bins) / weights.sum(dim=-3)


class LinearDepth(LinearMaps):
    """Weights of the bins, a linear function of each cell of all maps."""

    def __init__(self, widths: Sequence[int], options: DepthHeadConfig) -> None:
        super().__init__(widths, options.bins)
        self.options = options

    def forward(self, maps: Sequence[Map]) -> DepthOutput:
        """Metres on the largest grid."""
        options = self.options
        metres = metres_of(self.scores(maps), options.nearest, options.farthest)
        return DepthOutput(metres, maps[-1].shares(), relative=options.relative)
