"""Linear head of semantic segmentation, and its loss.

Letters: B images, C classes, h w grid of a map, hm wm cells of the labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from visft_ds.data.samples import Batch, Map
from visft_ds.tasks import Numbers
from visft_ds.tasks.classes import VOID
from visft_ds.tasks.criterion import Denominators, Losses
from visft_ds.tasks.linear import LinearMaps
from visft_ds.tasks.masks.data import MaskTargets, slices_of
from visft_ds.tasks.masks.interpolation import interpolated
from visft_ds.tasks.semantic.config import SemanticHeadConfig, SemanticLoss


@dataclass(frozen=True)
class SemanticOutput:
    """Prediction for a batch."""

    logits: Tensor  #: (B, C, h, w) over the padded batch
    extents: Tensor  #: (B, 2) on the host, height and width of each image as a share of (h, w)


class LinearHead(LinearMaps):
    """Logits of the classes, a linear function of each cell of all maps."""

    def __init__(self, widths: Sequence[int], options: SemanticHeadConfig) -> None:
        super().__init__(widths, options.num_classes, options.dropout)

    def forward(self, maps: Sequence[Map]) -> SemanticOutput:
        """Logits on the largest grid."""
        return SemanticOutput(self.scores(maps), maps[-1].shares())


class SemanticCriterion:
    """Cross-entropy of the labelled cells, to which the logits are interpolated: a mean over the global
    batch.
    """

    def __init__(self, loss: SemanticLoss) -> None:
        self.weights = {"ce": loss.ce}

    def count(self, batch: Batch) -> Numbers:
        """Labelled cells, by whose number the loss is divided."""
        number = 0
        for cells in cell_labels(batch.targets["semantic"]):
            number += int((cells != VOID).sum())
        return {"cells": float(number)}

    def __call__(
        self,
        output: SemanticOutput,
        targets: MaskTargets,
        loss_denominators: Denominators,
        image_ids: Tensor | None = None,
    ) -> Losses:
        return {"ce": self.loss_labels(output.logits, targets, output.extents) / loss_denominators["cells"]}

    def loss_labels(self, logits: Tensor, targets: MaskTargets, extents: Tensor) -> Tensor:
        """Cross-entropy summed over all labelled cells: logits (B, C, h, w), of which each image fills the
        shares `extents` (B, 2).
        """
        total = logits.new_zeros(())
        for of_image, cells, extent in zip(logits, cell_labels(targets), extents.tolist(), strict=True):
            fine = interpolated(of_image, extent, cells.shape)  # (C, hm, wm)
            total = total + F.cross_entropy(fine[None], cells[None], ignore_index=VOID, reduction="sum")
        return total


def cell_labels(targets: MaskTargets) -> Iterator[Tensor]:
    """Labels (hm, wm) int64 of each image: the class that covers most of a cell, VOID where most of it has
    none.
    """
    rows = slices_of(targets.counts.tolist())
    for of_image, (height, width) in zip(rows, targets.grids.tolist(), strict=True):
        masks = targets.masks[of_image, :height, :width].int()
        labelled = masks.sum(dim=0, keepdim=True, dtype=torch.int32)
        unlabelled = 255 - labelled.clamp(max=255)
        largest = torch.cat((unlabelled, masks)).argmax(dim=0)
        labels = F.pad(targets.labels[of_image], (1, 0), value=VOID)
        yield labels[largest]
