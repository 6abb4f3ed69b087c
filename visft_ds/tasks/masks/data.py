"""Data of mask tasks: large-scale jitter, soft masks as targets, and their packing into a batch.

Shape letters: B images, H W pixels, N objects packed over the batch, n objects of one image, hm wm cells of
the masks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import compress

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from visft_ds.data.labels import box_corners
from visft_ds.data.samples import Arrays, RawSample, Sample, Targets
from visft_ds.data.transforms import (
    Crop,
    Flip,
    FloatArray,
    Op,
    Pad,
    Resize,
    Size,
    apply_to_boxes,
    final_size,
    offset,
)
from visft_ds.tasks import Annotation
from visft_ds.tasks.masks.rasters import STRIDE, draw_masks, grid_size

#: Sides of images in evaluation are multiples of so many pixels, so that patches and strides lose no strip.
_MULTIPLE = 32


@dataclass(frozen=True)
class MaskTargets(Targets):
    """Masks of a batch, packed: image b owns the next `counts[b]` rows."""

    masks: Tensor  #: (N, hm, wm) uint8, covered part of each cell, 0 to 255
    labels: Tensor  #: (N,) int64, classes from 0: places among the categories of the head
    grids: Tensor  #: (B, 2) int64, cells that cover each image, of (hm, wm)
    counts: Tensor  #: (B,) int64, sums to N
    keys: Tensor  #: (B,) int64, the samples' random keys, from which the criterion draws its points
    host = ("grids", "counts", "keys")


def slices_of(counts: Sequence[int]) -> list[slice]:
    """The slice of each group among all entries, in groups of so many, one after the other."""
    slices = []
    first = 0
    for count in counts:
        slices.append(slice(first, first + count))
        first += count
    return slices


@dataclass(frozen=True)
class LargeScaleJitter:
    """Geometry of mask tasks alone: large-scale jitter (Ghiasi et al., arXiv 2012.07177).

    Training: mirror with probability `flip`; scale to fit a square of s * `size` pixels, s uniform in
    `scale`; extend right and bottom to `size` x `size` with the value `pad_value`; cut out a random square of
    that size. The extension belongs to the image, as in the reference. Evaluation: short side
    `min_size_test`, long side at most `max_size_test`, then extended to multiples of 32 pixels, so that
    patches lose no strip; that extension is padding. With `fixed_size`, both only scale to a square of that
    many pixels, and training also mirrors.
    """

    size: int
    scale: tuple[float, float]
    flip: float
    min_size_test: int
    max_size_test: int
    fixed_size: int | None
    pad_value: int

    def draw(self, size: Size, train: bool, generator: np.random.Generator) -> list[Op]:
        """Operations for an image of `size`."""
        ops: list[Op] = []
        if train and generator.random() < self.flip:
            ops.append(Flip())
        if self.fixed_size is not None:
            return [*ops, Resize(self.fixed_size, self.fixed_size)]
        if train:
            return [*ops, *self._jitter(size, generator)]
        height, width = evaluation_size(size, self.min_size_test, self.max_size_test)
        rows, columns = grid_size((height, width), _MULTIPLE)
        padding = Pad(rows * _MULTIPLE, columns * _MULTIPLE, self.pad_value, outside=True)
        return [Resize(height, width), padding]

    def _jitter(self, size: Size, generator: np.random.Generator) -> list[Op]:
        """Scaling, extension and crop of a training image."""
        factor = generator.uniform(*self.scale) * self.size / max(size)
        height = max(1, round(size[0] * factor))
        width = max(1, round(size[1] * factor))
        padded_height = max(height, self.size)
        padded_width = max(width, self.size)
        top = offset(padded_height - self.size, generator)
        left = offset(padded_width - self.size, generator)
        return [
            Resize(height, width),
            Pad(padded_height, padded_width, self.pad_value),
            Crop(top, left, self.size, self.size),
        ]


def evaluation_size(size: Size, short_side: int, max_long: int) -> Size:
    """The size with the given short side and the same shape; a smaller one if the long side would pass
    `max_long`.

    Both sides are cut off to integers, as in the reference (`short_side_size` of detection rounds the capped
    one).
    """
    small = min(size)
    large = max(size)
    if large * short_side > max_long * small:
        short_side = max(1, max_long * small // large)
    long_side = short_side
    if large > small:
        long_side = min(short_side * large // small, max_long)
    return (short_side, long_side) if size[0] <= size[1] else (long_side, short_side)


def visible_objects(raw: RawSample, ops: Sequence[Op]) -> tuple[list[Annotation], FloatArray]:
    """Objects of an image that have an area before and after `ops`, without crowds, and their corners (n, 4)
    there in pixels.
    """
    objects = [annotation for annotation in raw.annotations if not annotation["iscrowd"]]
    height, width = raw.size
    corners = box_corners(objects).clip(0, [width, height, width, height])
    moved = apply_to_boxes(corners, raw.size, ops)  # without area they have none afterwards either
    has_area = np.all(moved[:, 2:] > moved[:, :2], axis=1)
    return list(compress(objects, has_area)), moved[has_area]


def mask_targets(
    labels: Mapping[int, int],
    raw: RawSample,
    ops: Sequence[Op],
    generator: np.random.Generator,
    stride: int = STRIDE,
) -> Arrays:
    """Masks (n, hm, wm) uint8 and labels (n,) int64 of an image after `ops`.

    A mask has the covered part of cells of at most `stride` pixels; `labels` maps category ids. Crowd
    regions, objects without a mask, and objects whose box or mask has no area (before or after a crop) give
    no target.
    """
    seen, _ = visible_objects(raw, ops)
    objects = [annotation for annotation in seen if annotation.get("segmentation")]
    masks = draw_masks([annotation["segmentation"] for annotation in objects], raw.size, ops, stride)
    _clear_beyond_cuts(masks, raw.size, ops)
    classes = np.array([labels[annotation["category_id"]] for annotation in objects], dtype=np.int64)
    covered = masks.any(axis=(1, 2))
    return {"masks": masks[covered], "labels": classes[covered]}


def _clear_beyond_cuts(masks: npt.NDArray[np.uint8], size: Size, ops: Sequence[Op]) -> None:
    """Empty the cells of masks (n, hm, wm) that no longer show the image, as where a zoom looks beyond its
    tile.
    """
    height, width = size
    shown = apply_to_boxes(np.array([[0.0, 0.0, width, height]]), size, ops)
    cells = shown.reshape(2, 2) / final_size(size, ops)[::-1] * masks.shape[:0:-1]
    left, top = np.floor(cells[0]).astype(int)
    right, bottom = np.ceil(cells[1]).astype(int)
    masks[:, :top] = 0
    masks[:, bottom:] = 0
    masks[:, :, :left] = 0
    masks[:, :, right:] = 0


def packed_masks(samples: Sequence[Sample], task: str, frame: Size) -> MaskTargets:
    """Targets of a batch, whose images are padded to `frame`."""
    targets = [sample.targets[task] for sample in samples]
    labels = [target["labels"] for target in targets]
    counts = [len(of_image) for of_image in labels]
    grids = np.array([target["masks"].shape[1:] for target in targets])
    masks = np.zeros((sum(counts), *grids.max(axis=0)), dtype=np.uint8)
    for rows, target, (height, width) in zip(slices_of(counts), targets, grids, strict=True):
        masks[rows, :height, :width] = target["masks"]
    return MaskTargets(
        masks=torch.from_numpy(masks),
        labels=torch.from_numpy(np.concatenate(labels)),
        grids=torch.from_numpy(grids),
        counts=torch.tensor(counts),
        keys=torch.tensor([sample.random_key for sample in samples]),
    )
