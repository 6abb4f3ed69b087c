"""Detection data: geometry of the DETR recipe, boxes as targets, and their packing into a batch.

Shape letters: B images, H W pixels, N objects packed over the batch, n objects of one image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from visft_ds.data.samples import Batch, RawSample, Targets
from visft_ds.data.transforms import (
    Crop,
    Flip,
    Op,
    Resize,
    ShortSides,
    Size,
    apply_to_boxes,
    final_size,
    short_side_size,
)
from visft_ds.tasks import Results


@dataclass(frozen=True)
class DetectionTargets(Targets):
    """Boxes of a batch, packed: image b owns the next `counts[b]` rows."""

    boxes: Tensor  #: (N, 4) float32, cxcywh, relative to the unpadded image, in [0, 1]
    labels: Tensor  #: (N,) int64, raw COCO category ids (1..90)
    counts: Tensor  #: (B,) int64, sums to N


@dataclass(frozen=True)
class CropRecipe:
    """Geometry of detection alone: that of the DETR recipe, with a cap for a plain ViT.

    Training: mirror; then, with equal chances, either scale as `sides` does, or scale the short side to one
    of `crop_min_size`, cut out a random rectangle with sides from `crop_size` and scale that as in the
    first case. Evaluation, and all of it where `sides` has a `fixed_size`: as `sides`.
    """

    sides: ShortSides
    crop_min_size: Sequence[int]
    crop_size: tuple[int, int]

    def draw(self, size: Size, train: bool, generator: np.random.Generator) -> list[Op]:
        if self.sides.fixed_size is not None:
            return self.sides.draw(size, train, generator)
        ops: list[Op] = [Flip()] if train and generator.random() < self.sides.flip else []
        if train and generator.random() >= 0.5:
            side = self.crop_min_size[int(generator.integers(0, len(self.crop_min_size)))]
            first = short_side_size(size, side, None)
            width = _between(*self.crop_size, first[1], generator)
            height = _between(*self.crop_size, first[0], generator)
            top = int(generator.integers(0, first[0] - height + 1))
            left = int(generator.integers(0, first[1] - width + 1))
            ops += [Resize(*first), Crop(top, left, height, width)]
            size = (height, width)
        return [*ops, self.sides.scale(size, train, generator)]


def detection_targets(
    labels: Mapping[int, int] | None, raw: RawSample, ops: Sequence[Op], generator: np.random.Generator
) -> Mapping[str, npt.NDArray[Any]]:
    """Boxes (n, 4) float32 cxcywh relative to the image after `ops`, labels (n,) int64.

    `labels` maps category ids; None leaves them as they are. Crowd regions and boxes without area (before or
    after a crop) give no target.
    """
    used = [annotation for annotation in raw.annotations if not annotation["iscrowd"]]
    xywh = np.array([annotation["bbox"] for annotation in used], dtype=np.float64).reshape(-1, 4)
    ids = [annotation["category_id"] for annotation in used]
    classes = np.array(ids if labels is None else [labels[id_] for id_ in ids], dtype=np.int64)
    boxes = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1).clip(0, raw.size[::-1] * 2)
    kept = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    boxes, classes = apply_to_boxes(boxes[kept], raw.size, ops), classes[kept]
    kept = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    boxes, classes = boxes[kept], classes[kept]
    height, width = final_size(raw.size, ops)
    centres, extents = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    relative = np.concatenate([centres, extents], axis=1) / [width, height, width, height]
    return {"boxes": relative.astype(np.float32), "labels": classes}


def box_results(
    batch: Batch, image: int, corners: Tensor, scores: Tensor, labels: Tensor, classes: Sequence[int] | None
) -> Results:
    """Predictions of an image of the batch in COCO's results format: image_id, category_id, bbox, score.

    `corners` (n, 4) are relative to the image; bbox is (x, y, w, h) in pixels of the stored one. category_id
    is the label, or its entry in `classes`. All is on the host.
    """
    height, width = batch.original_sizes[image].tolist()
    pixels = (corners.double() * torch.tensor([width, height, width, height])).tolist()
    ids = labels.tolist() if classes is None else [classes[label] for label in labels.tolist()]
    image_id, rows = int(batch.image_ids[image]), zip(ids, pixels, scores.tolist(), strict=True)
    return [
        {"image_id": image_id, "category_id": id_, "bbox": [x0, y0, x1 - x0, y1 - y0], "score": score}
        for id_, (x0, y0, x1, y1), score in rows
    ]


def _between(low: int, high: int, available: int, generator: np.random.Generator) -> int:
    """A side from [low, high], as far as the image has that many pixels."""
    return int(generator.integers(min(low, available), min(high, available) + 1))
