"""Segmentation data: large-scale jitter, soft masks as targets, and their packing into a batch.

Shape letters: B images, H W pixels, N objects packed over the batch, n objects of one image, hm wm cells of
the masks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from torch import Tensor

from visft_ds.data.samples import RawSample, Targets
from visft_ds.data.transforms import Crop, Flip, Op, Pad, Resize, Size, final_size
from visft_ds.tasks.masks.rasters import draw_masks, placement


@dataclass(frozen=True)
class SegmentationTargets(Targets):
    """Masks of a batch, packed: image b owns the next `counts[b]` rows."""

    masks: Tensor  #: (N, hm, wm) uint8, covered part of each cell, 0 to 255
    labels: Tensor  #: (N,) int64, classes from 0: places among the categories of the head
    extents: Tensor  #: (B, 2) float32, height and width of each image as a share of the padded batch
    mask_extents: Tensor  #: (B, 2) float32, the same as a share of the grid (hm, wm)
    counts: Tensor  #: (B,) int64, sums to N
    keys: Tensor  #: (B,) int64, the samples' random keys, from which the criterion draws its points
    host: ClassVar[tuple[str, ...]] = ("counts", "keys")


@dataclass(frozen=True)
class LargeScaleJitter:
    """Geometry of segmentation alone: large-scale jitter (Ghiasi et al., arXiv 2012.07177).

    Training: mirror with probability `flip`; scale to fit a square of s * `size` pixels, s uniform in
    `scale`; extend right and bottom to `size` x `size` with the value `pad_value`; cut out a random square of
    that size. The extension belongs to the image, as in the reference. Evaluation: short side `min_size_test`,
    long side at most `max_size_test`, then extended to multiples of `eval_multiple` pixels, so that patches
    lose no strip; that extension is padding. With `fixed_size`, both only scale to a square of that many
    pixels, and training also mirrors.
    """

    size: int
    scale: tuple[float, float]
    flip: float
    pad_value: int
    min_size_test: int
    max_size_test: int
    eval_multiple: int
    fixed_size: int | None

    def draw(self, size: Size, train: bool, generator: np.random.Generator) -> list[Op]:
        ops: list[Op] = [Flip()] if train and generator.random() < self.flip else []
        if self.fixed_size is not None:
            return [*ops, Resize(self.fixed_size, self.fixed_size)]
        if not train:
            scaled = evaluation_size(size, self.min_size_test, self.max_size_test)
            height, width = (-(-side // self.eval_multiple) * self.eval_multiple for side in scaled)
            return [*ops, Resize(*scaled), Pad(height, width, self.pad_value, outside=True)]
        factor = generator.uniform(*self.scale) * self.size / max(size)
        height, width = (max(1, round(side * factor)) for side in size)
        padded = (max(height, self.size), max(width, self.size))
        top, left = (int(generator.integers(0, side - self.size + 1)) for side in padded)
        return [
            *ops,
            Resize(height, width),
            Pad(*padded, self.pad_value),
            Crop(top, left, self.size, self.size),
        ]


def evaluation_size(size: Size, short_side: int, max_size_train: int) -> Size:
    """The size with the given short side and the same shape; a smaller one if the long side would pass
    `max_size_train`.

    Both sides are cut off to integers, as in the reference (`short_side_size` of detection rounds the capped
    one).
    """
    small, large = min(size), max(size)
    if large * short_side > max_size_train * small:
        short_side = max(1, max_size_train * small // large)
    long_side = min(short_side * large // small, max_size_train) if large > small else short_side
    return (short_side, long_side) if size[0] <= size[1] else (long_side, short_side)


def segmentation_targets(
    labels: Mapping[int, int],
    mask_stride: int,
    raw: RawSample,
    ops: Sequence[Op],
    generator: np.random.Generator,
) -> dict[str, npt.NDArray[Any]]:
    """Masks (n, hm, wm) uint8 and labels (n,) int64 of an image after `ops`.

    A mask has the covered part of cells of at most `mask_stride` pixels: with 4, the dice loss of a good
    prediction is
    0.5 % higher than with masks of full size and its BCE 2 % (8 pixels: 1.8 % and 10 %), at 40 times less
    work. `labels` maps category ids. Crowd regions, objects without a mask, and objects whose box or mask has
    no area (before or after a crop) give no target.
    """
    used = [one for one in raw.annotations if not one["iscrowd"] and one.get("segmentation")]
    boxes = np.array([one["bbox"] for one in used], dtype=np.float64).reshape(-1, 4)
    stored, after = raw.size[::-1], final_size(raw.size, ops)[::-1]
    low, high = boxes[:, :2].clip(0, stored), (boxes[:, :2] + boxes[:, 2:]).clip(0, stored)
    scale, offset = placement(raw.size, ops)
    # a mirrored box has its corners exchanged
    moved = (low * scale + offset).clip(0, after) != (high * scale + offset).clip(0, after)
    used = list(compress(used, ((high > low) & moved).all(axis=1)))
    masks = draw_masks([one["segmentation"] for one in used], raw.size, ops, mask_stride)
    covered = masks.any(axis=(1, 2))
    classes = np.array([labels[one["category_id"]] for one in used], dtype=np.int64)
    return {"masks": masks[covered], "labels": classes[covered]}
