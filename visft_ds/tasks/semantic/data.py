"""Data of semantic segmentation: masks of the classes of an image, or the class of each of its cells.

Letters: B images, C classes, n classes of one image, hm wm cells of the masks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from visft_ds.tasks.classes import VOID
from visft_ds.tasks.masks.data import SegmentationTargets


@dataclass(frozen=True)
class SemanticTargets(SegmentationTargets):
    """Masks of a batch, one for each class of an image."""

    grids: Tensor  #: (B, 2) int64, cells that cover each image
    shares: Tensor  #: `extents` on the host
    host = ("counts", "keys", "grids", "shares")

    def cells(self) -> Iterator[Tensor]:
        """Labels (hm, wm) int64 of each image: the class that covers most of a cell, VOID where most of it
        has none.
        """
        first = 0
        for count, (height, width) in zip(self.counts.tolist(), self.grids.tolist(), strict=True):
            own = slice(first, first + count)
            masks, labels = self.masks[own, :height, :width].int(), self.labels[own]
            none = 255 - masks.sum(dim=0, keepdim=True, dtype=torch.int32).clamp(max=255)
            most = torch.cat((none, masks)).argmax(dim=0)
            yield torch.cat((labels.new_full((1,), VOID), labels))[most]
            first += count
