"""Linear head of semantic segmentation, and its loss.

Letters: B images, C classes, h w grid of a map, hm wm cells of the labels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visft_ds.data.samples import Batch, Map
from visft_ds.ops import at_least_float32
from visft_ds.tasks.channels import Channels
from visft_ds.tasks.classes import VOID
from visft_ds.tasks.masks.interpolation import interpolation
from visft_ds.tasks.semantic.config import SemanticHeadConfig, SemanticLoss
from visft_ds.tasks.semantic.data import SemanticTargets


@dataclass(frozen=True)
class SemanticOutput:
    """Prediction for a batch."""

    logits: Tensor  #: (B, C, h, w) over the padded batch
    #: (B, 2) on the host, height and width of each image as a share of (h, w); None: as of the padded batch
    #: in pixels.
    extents: Tensor | None = None


class LinearHead(nn.Module):
    """A linear function of each cell of all maps, which are brought to the largest grid.

    DINOv3's has a batch norm in front, whose means would depend on how a batch is divided.
    """

    def __init__(self, widths: Sequence[int], options: SemanticHeadConfig) -> None:
        super().__init__()
        self.channels = Channels(sum(widths))
        self.dropout = nn.Dropout2d(options.dropout)
        self.classifier = nn.Conv2d(sum(widths), options.num_classes, 1)
        nn.init.normal_(self.classifier.weight, std=0.01)
        self.classifier.bias = nn.Parameter(torch.zeros(options.num_classes))

    def forward(self, maps: Sequence[Map]) -> SemanticOutput:
        """Logits on the largest grid."""
        grid = max((one.features.shape[2:] for one in maps), key=math.prod)
        parts = [one.features if one.features.shape[2:] == grid else one.resized(grid) for one in maps]
        x = self.channels(torch.cat(parts, dim=1).movedim(1, -1)).movedim(-1, 1)
        return SemanticOutput(at_least_float32(self.classifier(self.dropout(x))))


class SemanticCriterion:
    """Cross-entropy of the labelled cells, to which the logits are interpolated: a mean over the global
    batch.
    """

    def __init__(self, head: SemanticHeadConfig, loss: SemanticLoss) -> None:
        self.weights = {"ce": loss.ce}

    def count(self, batch: Batch) -> dict[str, float]:
        return {"cells": float(sum((cells != VOID).sum() for cells in batch.targets["semantic"].cells()))}

    def __call__(
        self,
        output: SemanticOutput,
        targets: SemanticTargets,
        loss_denominators: Mapping[str, Tensor],
        image_ids: Any = None,
    ) -> dict[str, Tensor]:
        extents = targets.shares if output.extents is None else output.extents
        total = output.logits.new_zeros(())
        for logits, cells, shares in zip(output.logits, targets.cells(), extents.tolist(), strict=True):
            rows, columns = (
                interpolation(logits.shape[1 + a], shares[a], cells.shape[a], logits) for a in (0, 1)
            )
            fine = (rows @ logits @ columns.T)[None]  # (1, C, hm, wm)
            total = total + F.cross_entropy(fine, cells[None], ignore_index=VOID, reduction="sum")
        return {"ce": total / loss_denominators["cells"]}
