"""A linear function of each cell of all maps, for the heads that are no more."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from visft_ds.data.samples import Map
from visft_ds.ops import at_least_float32
from visft_ds.tasks.channels import Channels


class LinearMaps(nn.Module):
    """A linear function of each cell of all maps, on the largest grid.

    Scores of the coarser maps are interpolated, not their features: a linear function and an interpolation
    may change places. DINOv3's head has a batch norm in front, whose means would depend on how a batch is
    divided.
    """

    def __init__(self, widths: Sequence[int], outputs: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.channels = nn.ModuleList(Channels(width) for width in widths)
        self.dropout = nn.Dropout2d(dropout)
        self.classifiers = nn.ModuleList()
        for width in widths:
            classifier = nn.Conv2d(width, outputs, 1, bias=False)
            nn.init.normal_(classifier.weight, std=0.01)
            self.classifiers.append(classifier)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def scores(self, maps: Sequence[Map]) -> Tensor:
        """(B, outputs, h, w) of the largest grid, at least float32."""
        grid = max((level.features.shape[2:] for level in maps), key=math.prod)
        total = self.bias[:, None, None]
        for level, channels, classifier in zip(maps, self.channels, self.classifiers, strict=True):
            normed = channels(level.features.movedim(1, -1)).movedim(-1, 1)
            scores = at_least_float32(classifier(self.dropout(normed)))
            if scores.shape[2:] != grid:
                scores = replace(level, features=scores).resized(grid)
            total = total + scores
        return total
