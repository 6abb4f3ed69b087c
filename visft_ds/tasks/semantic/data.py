"""Data of semantic segmentation: the class of each cell of an image.

Letters: B images, C classes, hm wm cells of the labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from torch import Tensor

from visft_ds.data.samples import RawSample, Targets
from visft_ds.data.transforms import Op
from visft_ds.tasks.classes import VOID
from visft_ds.tasks.segmentation.masks import draw_masks


@dataclass(frozen=True)
class SemanticTargets(Targets):
    """Labels of a batch."""

    cells: Tensor  #: (B, hm, wm) uint8, places among the classes of the head, VOID where there is none and in padding
    grids: Tensor  #: (B, 2) int64, cells that cover each image
    extents: Tensor  #: (B, 2) float32, height and width of each image as a share of the padded batch
    host: ClassVar = ("grids", "extents")


def semantic_targets(
    places: Mapping[int, int], mask_stride: int, raw: RawSample, ops: Sequence[Op], generator: np.random.Generator
) -> dict[str, npt.NDArray[Any]]:
    """Labels (hm, wm) uint8 of an image after `ops`: the class that covers most of a cell of at most `mask_stride`
    pixels, VOID where most of it has none. `places` maps category ids.
    """
    covered = draw_masks([one["segmentation"] for one in raw.annotations], raw.size, ops, mask_stride)
    none = 255 - covered.sum(axis=0, dtype=np.int32).clip(max=255)
    classes = np.array([VOID, *(places[one["category_id"]] for one in raw.annotations)], dtype=np.uint8)
    return {"cells": classes[np.concatenate([none[None], covered]).argmax(axis=0)]}
