"""Output of a head that predicts masks.

Letters: B images, h w grid of the masks, Q queries, C classes, L prediction sets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from visft_ds.ops import at_least_float32
from visft_ds.tasks.masks.config import ClassIds


@dataclass(frozen=True)
class MaskOutput:
    """Predictions before the first layer of a head and of each layer; the last set is the head's answer."""

    logits: Tensor  #: (L, B, Q, C + 1), the last class is "no object"
    masks: Tensor  #: (L, B, Q, h, w) logits over the padded batch, 0 at padded cells
    extents: Tensor  #: (B, 2) on the host, height and width of each image as a share of (h, w)
    class_ids: ClassIds = "contiguous"  #: of the head
    max_detections: int = 100  #: most objects of an image

    @classmethod
    def of_sets(
        cls,
        sets: Sequence[tuple[Tensor, Tensor]],
        extents: Tensor,
        max_detections: int,
        class_ids: ClassIds = "contiguous",
    ) -> MaskOutput:
        """The output of prediction sets, each of class logits (B, Q, C + 1) and mask logits (B, Q, h, w)."""
        logits, masks = (at_least_float32(torch.stack(tensors)) for tensors in zip(*sets, strict=True))
        return cls(logits, masks, extents, class_ids, max_detections)

    def last(self) -> MaskOutput:
        """The answer without what only losses look at."""
        return replace(self, logits=self.logits[-1:], masks=self.masks[-1:])
