"""Segmentation data: large-scale jitter, soft masks as targets, and their packing into a batch.

As in `transforms`, the geometry comes from the sample's random numbers and the stored size alone.

Shape letters: B images, H W pixels, N objects packed over the batch, n objects of one image, hm wm cells of the masks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from visft_ds.data.manifest import Manifest
from visft_ds.data.samples import Batch, RawSample, Sample, has_targets, stack_samples
from visft_ds.data.spans import span
from visft_ds.data.transforms import Crop, Flip, Op, Resize, Size, apply_to_image, labels_of, places
from visft_ds.tasks.segmentation.config import CONTENT_MULTIPLE
from visft_ds.tasks.segmentation.masks import MaskPlacement, grid_size, rasterise, rasterise_all

#: The raw ids of COCO's 80 categories. By default, a label is a place in here.
COCO_CATEGORY_IDS = tuple(sorted(set(range(1, 91)) - {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}))
_LABELS_OF_COCO = places(COCO_CATEGORY_IDS)


@dataclass(frozen=True)
class Pad:
    """Extend right and bottom to this size."""

    height: int
    width: int


@dataclass(frozen=True)
class SegmentationTargets:
    """Masks of a batch, packed: image b owns the next `counts[b]` rows. `counts` and `keys` stay on the host."""

    masks: Tensor  #: (N, hm, wm) uint8, covered part of each cell, 0 to 255
    labels: Tensor  #: (N,) int64, classes from 0: places among the categories of the head
    extents: Tensor  #: (B, 2) float32, height and width of each image as a share of the padded batch
    mask_extents: Tensor  #: (B, 2) float32, the same as a share of the grid (hm, wm)
    counts: Tensor  #: (B,) int64, sums to N
    keys: Tensor  #: (B,) int64, the samples' random keys, from which the criterion draws its points

    def to(self, device: torch.device) -> SegmentationTargets:
        """The same targets on `device`, except what only the host uses: it must not wait for a copy to come back."""
        names = ("masks", "labels", "extents", "mask_extents")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})

    def head_inputs(self) -> dict[str, Tensor]:
        """Nothing: masks are for the criterion alone."""
        return {}


class SegmentationTransform:
    """Large-scale jitter (Ghiasi et al., arXiv 2012.07177) and soft masks.

    Training: mirror with probability `flip`; scale to fit a square of s * `size` pixels, s uniform in `scale`; extend
    right and bottom to `size` x `size` with the value `pad_value`; cut out a random square of that size. The extension
    belongs to the image, as in the reference: patches there are ordinary patches. With `content_only` the square is cut
    down to the rectangle that shows image, extended to multiples of CONTENT_MULTIPLE pixels as far as the square
    reaches: the same patches as before, without those of the extension alone. Evaluation: short side `eval_short`, long
    side at most `eval_max_long`, then extended to multiples of `eval_multiple` pixels, so that no strip is lost where
    the patch size does not divide the image; that extension is padding. With `fixed_size`, both only scale to a square
    of that many pixels, and training also mirrors.

    Crowd regions, objects without a mask, and objects whose box or mask has no area (before or after the crop) give no
    target; images without targets stay.

    The sample's `targets["segmentation"]` is {"masks": (n, hm, wm) uint8 with cells of at most `mask_stride` pixels,
    "labels": (n,) int64, places in `classes`, "frame": (2,) height and width including padding}.

    Why cells of 4 pixels: against masks of full size, rasterised four times finer, the dice loss of a good prediction
    is then 0.5 % higher and its BCE 2 % (8 pixels: 1.8 % and 10 %; 2 pixels: under 0.1 %), with 64 KiB a mask at 1,024
    pixels instead of 1 MiB, and 40 times less work.

    Raises:
        ValueError: sizes, scales or probabilities out of range; when called, a category that is not in
            `classes` or a segmentation that cannot be read (names image and annotation).
    """

    def __init__(
        self,
        train: bool,
        *,
        size: int = 1024,
        scale: tuple[float, float] = (0.1, 2.0),
        flip: float = 0.5,
        pad_value: int = 128,
        eval_short: int = 800,
        eval_max_long: int = 1333,
        eval_multiple: int = 32,
        fixed_size: int | None = None,
        mask_stride: int = 4,
        content_only: bool = False,
        classes: Sequence[int] = COCO_CATEGORY_IDS,
    ) -> None:
        if min(size, eval_short, eval_max_long, eval_multiple, fixed_size or 1, mask_stride) < 1:
            raise ValueError(
                f"image sizes must be positive: size={size}, eval_short={eval_short}, eval_max_long={eval_max_long}, "
                f"eval_multiple={eval_multiple}, fixed_size={fixed_size}, mask_stride={mask_stride}"
            )
        if not 0 < scale[0] <= scale[1]:
            raise ValueError(f"scale={scale} is not allowed: give two numbers above 0, the smaller one first")
        if not 0 <= flip <= 1 or not 0 <= pad_value <= 255:
            raise ValueError(f"flip={flip} must be a probability, pad_value={pad_value} a pixel value from 0 to 255")
        self.train = train
        self.size = size
        self.scale = scale
        self.flip = flip
        self.pad_value = pad_value
        self.eval_short = eval_short
        self.eval_max_long = eval_max_long
        self.eval_multiple = eval_multiple
        self.fixed_size = fixed_size
        self.mask_stride = mask_stride
        self.content_only = content_only
        self.labels = places(classes)

    def __call__(self, raw: RawSample, generator: np.random.Generator) -> Sample:
        """Transform one sample; evaluation draws nothing from `generator`."""
        ops = self.geometry(raw.size, generator)
        size = final_size(raw.size, ops)
        multiple = 1 if self.train or self.fixed_size else self.eval_multiple
        frame = (-(-size[0] // multiple) * multiple, -(-size[1] // multiple) * multiple)
        image = None
        if raw.image is not None:
            image = transform_image(raw.image, [*ops, Pad(*frame)], self.pad_value)
        try:
            with span("masks"):
                targets = segmentation_targets(raw.annotations, raw.size, ops, self.mask_stride, self.labels)
        except ValueError as error:
            raise ValueError(f"image {raw.image_id}: {error}") from error
        return Sample(
            index=raw.index,
            image_id=raw.image_id,
            original_size=raw.size,
            size=size,
            image=image,
            random_key=0,
            targets={"segmentation": {**targets, "frame": np.array(frame)}},
        )

    def geometry(self, size: Size, generator: np.random.Generator) -> list[Op | Pad]:
        """Geometric operations for an image of `size`, in order."""
        ops: list[Op | Pad] = []
        if self.train and generator.random() < self.flip:
            ops.append(Flip())
        if self.fixed_size is not None:
            return [*ops, Resize(self.fixed_size, self.fixed_size)]
        if not self.train:
            return [*ops, Resize(*evaluation_size(size, self.eval_short, self.eval_max_long))]
        factor = generator.uniform(*self.scale) * self.size / max(size)
        height, width = (max(1, round(side * factor)) for side in size)
        padded = (max(height, self.size), max(width, self.size))
        top, left = (int(generator.integers(0, side - self.size + 1)) for side in padded)
        if not self.content_only:
            return [*ops, Resize(height, width), Pad(*padded), Crop(top, left, self.size, self.size)]
        # What is extended begins at the top left corner: the image fills the square from there.
        shown = (min(height, self.size), min(width, self.size))
        return [*ops, Resize(height, width), Crop(top, left, *shown), Pad(*self._extended(shown))]

    def _extended(self, shown: Size) -> Size:
        height, width = (min(self.size, -(-side // CONTENT_MULTIPLE) * CONTENT_MULTIPLE) for side in shown)
        return height, width

    def extremes(self, size: Size) -> set[Size]:
        """The size of most pixels that training can give an image of `size`; it is the highest and widest, too."""
        if self.fixed_size is not None or not self.content_only:
            side = self.fixed_size or self.size
            return {(side, side)}
        factor = self.scale[1] * self.size / max(size)
        height, width = (min(self.size, max(1, round(side * factor))) for side in size)
        return {self._extended((height, width))}


def evaluation_size(size: Size, short_side: int, max_long: int) -> Size:
    """The size with the given short side and the same shape; a smaller one if the long side would pass `max_long`.

    Both sides are cut off to integers, as in the reference (`short_side_size` of detection rounds the capped one).
    """
    small, large = min(size), max(size)
    if large * short_side > max_long * small:
        short_side = max(1, max_long * small // large)
    long_side = min(short_side * large // small, max_long) if large > small else short_side
    return (short_side, long_side) if size[0] <= size[1] else (long_side, short_side)


def final_size(size: Size, ops: Sequence[Op | Pad]) -> Size:
    """(height, width) after `ops`."""
    for op in ops:
        if not isinstance(op, Flip):
            size = (op.height, op.width)
    return size


def placement(size: Size, ops: Sequence[Op | Pad]) -> MaskPlacement:
    """Map from the pixels of an image of `size` to those after `ops`."""
    scale, offset = np.ones(2), np.zeros(2)  # x, y
    for op in ops:
        if isinstance(op, Flip):
            scale[0], offset[0] = -scale[0], size[1] - offset[0]
        elif isinstance(op, Resize):
            factor = np.array([op.width / size[1], op.height / size[0]])
            scale, offset = scale * factor, offset * factor
        elif isinstance(op, Crop):
            offset = offset - [op.left, op.top]
        size = final_size(size, [op])
    return MaskPlacement(float(scale[0]), float(offset[0]), float(scale[1]), float(offset[1]))


def transform_image(image: npt.NDArray[np.uint8], ops: Sequence[Op | Pad], pad_value: int) -> Tensor:
    """(H, W, 3) uint8 -> (3, H', W') uint8; flips and scalings come before the first `Pad`."""
    first = next((place for place, op in enumerate(ops) if isinstance(op, Pad)), len(ops))
    tensor = apply_to_image(image, [op for op in ops[:first] if not isinstance(op, Pad)])
    for op in ops[first:]:
        if isinstance(op, Pad):
            missing = (0, op.width - tensor.shape[2], 0, op.height - tensor.shape[1])
            tensor = F.pad(tensor, missing, value=pad_value) if any(missing) else tensor
        else:
            assert isinstance(op, Crop), op
            tensor = tensor[:, op.top : op.top + op.height, op.left : op.left + op.width]
    return tensor.contiguous()


def segmentation_targets(
    annotations: Sequence[Mapping[str, Any]],
    size: Size,
    ops: Sequence[Op | Pad],
    mask_stride: int,
    labels: Mapping[int, int] = _LABELS_OF_COCO,
) -> dict[str, npt.NDArray[Any]]:
    """Masks (n, hm, wm) uint8 and labels (n,) int64 of the image after `ops`; `size` is that of the stored image.

    `labels` maps category ids.

    Raises ValueError for an unknown category or an unreadable segmentation, naming the annotation.
    """
    after, place = final_size(size, ops), placement(size, ops)
    grid = grid_size(after, mask_stride)
    used = [annotation for annotation in annotations if not annotation["iscrowd"] and annotation.get("segmentation")]
    used = list(compress(used, _seen([annotation["bbox"] for annotation in used], size, place, after)))
    classes = labels_of(used, labels)
    try:
        masks = rasterise_all([annotation["segmentation"] for annotation in used], size, place, after, grid)
    except ValueError:
        _name_unreadable(used, size, place, after, grid)
        raise
    covered = masks.any(axis=(1, 2))
    return {"masks": masks[covered], "labels": classes[covered]}


def _name_unreadable(
    annotations: Sequence[Mapping[str, Any]], size: Size, place: MaskPlacement, after: Size, grid: Size
) -> None:
    """Raise the first annotation's ValueError with its id."""
    for annotation in annotations:
        try:
            rasterise(annotation["segmentation"], size, place, after, grid)
        except ValueError as error:
            raise ValueError(f"annotation {annotation.get('id')}: {error}") from error


def _seen(bboxes: Sequence[Sequence[float]], size: Size, place: MaskPlacement, after: Size) -> npt.NDArray[np.bool_]:
    """(n,) whether boxes (x, y, w, h) have area inside the stored image and inside the transformed one."""
    boxes = np.array(bboxes, dtype=np.float64).reshape(-1, 4)
    low = boxes[:, :2].clip(0, [size[1], size[0]])
    high = (boxes[:, :2] + boxes[:, 2:]).clip(0, [size[1], size[0]])
    limit = [after[1], after[0]]
    # a mirrored box has its corners exchanged
    moved = place.points(low).clip(0, limit) != place.points(high).clip(0, limit)
    seen: npt.NDArray[np.bool_] = ((high > low) & moved).all(axis=1)
    return seen


def collate_segmentation(samples: Sequence[Sample]) -> Batch:
    """A batch with `targets["segmentation"]`; without targets where no labels were read (`Sample.targets` empty).

    `images` is as large as the largest frame; `sizes` are those of the images without padding.
    """
    frames = [_frame(sample) for sample in samples]
    batch = stack_samples([replace(sample, size=frame) for sample, frame in zip(samples, frames, strict=True)])
    batch = replace(batch, sizes=torch.tensor([sample.size for sample in samples]))
    if not has_targets(samples, "segmentation"):
        return batch
    whole = (max(height for height, _ in frames), max(width for _, width in frames))
    return replace(batch, targets={"segmentation": pack_segmentation(samples, whole)})


def _frame(sample: Sample) -> Size:
    """Height and width including padding: known from the pixels or, without them, from the targets."""
    if sample.image is not None:
        return sample.image.shape[1], sample.image.shape[2]
    height, width = sample.targets["segmentation"]["frame"].tolist()
    return height, width


def pack_segmentation(samples: Sequence[Sample], frame: Size) -> SegmentationTargets:
    """The masks of all samples one after another; `frame` is the size of the padded batch."""
    parts = [sample.targets["segmentation"] for sample in samples]
    counts = [len(part["labels"]) for part in parts]
    grids = np.array([part["masks"].shape[1:] for part in parts])
    masks = np.zeros((sum(counts), *grids.max(axis=0)), dtype=np.uint8)
    for end, part, (height, width) in zip(np.cumsum(counts), parts, grids, strict=True):
        masks[end - len(part["masks"]) : end, :height, :width] = part["masks"]
    sizes = np.array([sample.size for sample in samples])
    return SegmentationTargets(
        masks=torch.from_numpy(masks),
        labels=torch.from_numpy(np.concatenate([part["labels"] for part in parts])),
        extents=torch.from_numpy((sizes / frame).astype(np.float32)),
        mask_extents=torch.from_numpy((grids / grids.max(axis=0)).astype(np.float32)),
        counts=torch.tensor(counts),
        keys=torch.tensor([sample.random_key for sample in samples]),
    )


def image_targets(
    labels: Mapping[int, int], mask_stride: int, raw: RawSample, ops: Sequence[Op], generator: np.random.Generator
) -> Mapping[str, npt.NDArray[Any]]:
    """The frame is the image: nothing is padded. An object without a mask has a box only."""
    try:
        with span("masks"):
            masks = segmentation_targets(raw.annotations, raw.size, ops, mask_stride, labels)
    except ValueError as error:
        raise ValueError(f"image {raw.image_id}: {error}") from error
    return {**masks, "frame": np.array(final_size(raw.size, ops))}


def problem_of(manifest: Manifest) -> str | None:
    """Objects without masks are background here: a set of boxes alone would teach that nothing is there."""
    without = next((f["count"] for f in manifest.findings if f["kind"] == "instance without mask"), 0)
    if 2 * without <= manifest.counts["annotations"]:
        return None
    return (
        f"{manifest.root}/{manifest.split}: {without} of its {manifest.counts['annotations']} objects have no "
        "mask. Segmentation would take them for background"
    )
