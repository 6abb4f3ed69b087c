"""Linear head of semantic segmentation, and its loss.

Letters: B images, C classes, h w grid of a map, hm wm cells of the labels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visft_ds.data.samples import Batch, Map
from visft_ds.ops import at_least_float32
from visft_ds.tasks.channels import Channels
from visft_ds.tasks.classes import VOID
from visft_ds.tasks.masks.data import MaskTargets, slices_of
from visft_ds.tasks.masks.interpolation import interpolated
from visft_ds.tasks.semantic.config import SemanticHeadConfig, SemanticLoss


@dataclass(frozen=True)
class SemanticOutput:
    """Prediction for a batch."""

    logits: Tensor  #: (B, C, h, w) over the padded batch
    #: (B, 2) on the host, height and width of each image as a share of (h, w); None: as of the padded batch
    #: in pixels.
    extents: Tensor | None = None


class LinearHead(nn.Module):
    """A linear function of each cell of all maps, on the largest grid.

    Scores of the coarser maps are interpolated, not their features: a linear function and an interpolation
    may change places. DINOv3's head has a batch norm in front, whose means would depend on how a batch is
    divided.
    """

    def __init__(self, widths: Sequence[int], options: SemanticHeadConfig) -> None:
        super().__init__()
        self.channels = nn.ModuleList(Channels(width) for width in widths)
        self.dropout = nn.Dropout2d(options.dropout)
        self.classifiers = nn.ModuleList()
        for width in widths:
            classifier = nn.Conv2d(width, options.num_classes, 1, bias=False)
            nn.init.normal_(classifier.weight, std=0.01)
            self.classifiers.append(classifier)
        self.bias = nn.Parameter(torch.zeros(options.num_classes))

    def forward(self, maps: Sequence[Map]) -> SemanticOutput:
        """Logits on the largest grid."""
        grid = max((level.features.shape[2:] for level in maps), key=math.prod)
        logits = self.bias[:, None, None]
        for level, channels, classifier in zip(maps, self.channels, self.classifiers, strict=True):
            normed = channels(level.features.movedim(1, -1)).movedim(-1, 1)
            scores = at_least_float32(classifier(self.dropout(normed)))
            if scores.shape[2:] != grid:
                scores = replace(level, features=scores).resized(grid)
            logits = logits + scores
        return SemanticOutput(logits)


class SemanticCriterion:
    """Cross-entropy of the labelled cells, to which the logits are interpolated: a mean over the global
    batch.
    """

    def __init__(self, loss: SemanticLoss) -> None:
        self.weights = {"ce": loss.ce}

    def count(self, batch: Batch) -> dict[str, float]:
        """Labelled cells, by whose number the loss is divided."""
        number = 0
        for cells in cell_labels(batch.targets["semantic"]):
            number += int((cells != VOID).sum())
        return {"cells": float(number)}

    def __call__(
        self,
        output: SemanticOutput,
        targets: MaskTargets,
        loss_denominators: Mapping[str, Tensor],
        image_ids: Tensor | None = None,
    ) -> dict[str, Tensor]:
        extents = targets.extents if output.extents is None else output.extents
        return {"ce": self.loss_labels(output.logits, targets, extents) / loss_denominators["cells"]}

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
