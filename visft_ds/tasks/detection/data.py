"""Detection data: geometry of the DETR recipe, boxes as targets, and their packing into a batch.

Shape letters: B images, H W pixels, N objects packed over the batch, n objects of one image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from visft_ds.data.samples import Arrays, Batch, RawSample, Targets
from visft_ds.data.transforms import (
    Crop,
    Flip,
    FloatArray,
    Op,
    Resize,
    ShortSides,
    Size,
    final_size,
    offset,
    short_side_size,
)
from visft_ds.tasks import Annotations, Results
from visft_ds.tasks.detection.roi import SIDE
from visft_ds.tasks.masks.data import visible_objects
from visft_ds.tasks.masks.rasters import draw_in_boxes

JITTER = 0.1  #: most that a side of a training box moves for its mask, of the box's width or height
MOST_MASKS = 32  #: objects of an image whose masks are learnt, drawn anew each time


@dataclass(frozen=True)
class DetectionTargets(Targets):
    """Boxes of a batch, packed: image b owns the next `counts[b]` rows."""

    boxes: Tensor  #: (N, 4) float32, cxcywh, relative to the unpadded image, in [0, 1]
    labels: Tensor  #: (N,) int64, classes: raw COCO category ids (1..90), or numbers of other categories
    counts: Tensor  #: (B,) int64, sums to N

    def image_of(self) -> Tensor:
        """(N,) the image of each object; the host does not wait for the device."""
        images = torch.arange(len(self.counts), device=self.counts.device)
        return torch.repeat_interleave(images, self.counts, output_size=len(self.boxes))


def corners_of(boxes: Tensor) -> Tensor:
    """(..., 4) cxcywh -> (..., 4) xyxy."""
    centres = boxes[..., :2]
    halves = 0.5 * boxes[..., 2:]
    return torch.cat((centres - halves, centres + halves), dim=-1)


@dataclass(frozen=True)
class InstanceTargets(DetectionTargets):
    """Boxes of a batch, and masks of those that have one, for a head that predicts both.

    A mask lies in a region, the box of its object moved a little: boxes of a prediction are not exact either.
    """

    regions: Tensor  #: (B, K, 4) float32 corners relative to the unpadded image; zeros beyond an image's own
    chosen: Tensor  #: (M,) int64, places of the regions with a mask among all B * K
    masks: Tensor  #: (M, SIDE, SIDE) uint8, covered part of each cell of a region, 0 to 255
    head_inputs: ClassVar = {"regions": "regions", "chosen": "chosen"}


@dataclass(frozen=True)
class CropRecipe:
    """Geometry of detection alone: that of the DETR recipe, with a cap for a plain ViT.

    Training: mirror; then, with equal chances, either scale as `sides` does, or scale the short side to one
    of `crop_min_size`, cut out a random rectangle with sides from `crop_size` and scale that as in the
    first case. Evaluation, and all of it where `sides` has a `fixed_size`: as `sides`.
    """

    sides: ShortSides
    crop_min_size: Sequence[int]
    crop_size: Size

    def draw(self, size: Size, train: bool, generator: np.random.Generator) -> list[Op]:
        """Operations for an image of `size`; see the class."""
        if self.sides.fixed_size is not None:
            return self.sides.draw(size, train, generator)
        if not train:
            return [self.sides.scale(size, train, generator)]
        ops: list[Op] = []
        if generator.random() < self.sides.flip:
            ops.append(Flip())
        if generator.random() >= 0.5:
            scaled, crop = self._crop(size, generator)
            ops += [scaled, crop]
            size = (crop.height, crop.width)
        return [*ops, self.sides.scale(size, train, generator)]

    def _crop(self, size: Size, generator: np.random.Generator) -> tuple[Resize, Crop]:
        """The rectangle that is cut out, and the scaling in front of it."""
        choice = int(generator.integers(0, len(self.crop_min_size)))
        scaled_height, scaled_width = short_side_size(size, self.crop_min_size[choice], None)
        width = self._side(scaled_width, generator)
        height = self._side(scaled_height, generator)
        top = offset(scaled_height - height, generator)
        left = offset(scaled_width - width, generator)
        return Resize(scaled_height, scaled_width), Crop(top, left, height, width)

    def _side(self, available: int, generator: np.random.Generator) -> int:
        """A side of the rectangle, as far as the image has that many pixels."""
        smallest, largest = self.crop_size
        return int(generator.integers(min(smallest, available), min(largest, available) + 1))


def detection_targets(
    labels: Mapping[int, int] | None,
    raw: RawSample,
    ops: Sequence[Op],
    generator: np.random.Generator,
) -> Arrays:
    """Boxes (n, 4) float32 cxcywh relative to the image after `ops`, labels (n,) int64.

    `labels` maps category ids; None leaves them as they are. Crowd regions and boxes without area (before or
    after a crop) give no target.
    """
    objects, corners = visible_objects(raw, ops)
    return _box_targets(labels, objects, corners, final_size(raw.size, ops))


def instance_targets(
    labels: Mapping[int, int] | None,
    raw: RawSample,
    ops: Sequence[Op],
    generator: np.random.Generator,
) -> Arrays:
    """Those of `detection_targets`, and regions (m, 4) float32 with masks (m, SIDE, SIDE) uint8, see
    `InstanceTargets`, of at most MOST_MASKS objects that have a mask.
    """
    objects, corners = visible_objects(raw, ops)
    height, width = size = final_size(raw.size, ops)
    boxes = _box_targets(labels, objects, corners, size)
    with_mask = [number for number, entry in enumerate(objects) if entry.get("segmentation")]
    if len(with_mask) > MOST_MASKS:
        with_mask = generator.permutation(with_mask)[:MOST_MASKS].tolist()
    own = corners[with_mask]
    sides = own[:, 2:] - own[:, :2]
    moved = own + np.tile(sides, 2) * generator.uniform(-JITTER, JITTER, own.shape)
    regions = moved.clip(0, [width, height, width, height])
    segmentations = [objects[number]["segmentation"] for number in with_mask]
    masks = draw_in_boxes(segmentations, regions, raw.size, ops, SIDE)
    relative = regions / [width, height, width, height]
    return {**boxes, "regions": relative.astype(np.float32), "masks": masks}


def _box_targets(
    labels: Mapping[int, int] | None,
    objects: Annotations,
    corners: FloatArray,
    size: Size,
) -> Arrays:
    """Boxes and labels of `detection_targets`, of corners in an image of this size."""
    height, width = size
    low = corners[:, :2]
    high = corners[:, 2:]
    boxes = np.concatenate([(low + high) / 2, high - low], axis=1)
    relative = boxes / [width, height, width, height]
    ids = [annotation["category_id"] for annotation in objects]
    if labels is not None:
        ids = [labels[id_] for id_ in ids]
    return {"boxes": relative.astype(np.float32), "labels": np.array(ids, dtype=np.int64)}


def box_results(
    batch: Batch,
    chosen: Tensor,
    corners: Tensor,
    scores: Tensor,
    labels: Tensor,
    classes: Sequence[int] | None,
) -> Results:
    """Predictions in COCO's results format: image_id, category_id, bbox, score.

    Args:
        chosen: (n, 2) int64, image and place of each result among the K of an image.
        corners: (B, K, 4) relative to the image; bbox is (x, y, w, h) in pixels of the stored one.
        scores: (B, K), on the host as all others.
        labels: (B, K) classes.
        classes: raw category id of each class; None: classes are raw ids.
    """
    images, places = chosen.unbind(1)
    sizes = batch.original_sizes[images].flip(1).repeat(1, 2)
    pixels = corners[images, places].double() * sizes
    columns = [batch.image_ids[images], labels[images, places], pixels, scores[images, places]]
    results = []
    for image_id, label, (x0, y0, x1, y1), score in zip(*(c.tolist() for c in columns), strict=True):
        category = label if classes is None else classes[label]
        bbox = [x0, y0, x1 - x0, y1 - y0]
        results.append({"image_id": image_id, "category_id": category, "bbox": bbox, "score": score})
    return results
