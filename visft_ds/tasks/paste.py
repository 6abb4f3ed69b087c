"""Objects of another picture pasted into a training picture (after Simple Copy-Paste, Ghiasi et al., arXiv
2012.07177).

What is pasted where follows from sizes, labels and random numbers alone: a process that reads labels only
arrives at the same objects.

Shape letters: H W pixels of the picture, h w pixels of a pasted object.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from faster_coco_eval import mask as coco_mask  # pycocotools' own warns under NumPy 2

from visft_ds.data.samples import RawSample
from visft_ds.data.transforms import BoolArray, Crop, Flip, Op, Resize, Size, apply_to_image, offset
from visft_ds.settings.tiles import LEAST_VISIBLE, Window
from visft_ds.tasks import Annotation
from visft_ds.tasks.masks.rasters import draw_masks, encode_mask

#: Smallest and largest size of a pasted object, of the share of its own picture that it had.
SCALES = (0.8, 1.25)
#: Least covered part of a pixel, of 255, that belongs to a pasted object.
HALF = 128

Area = tuple[slice, slice]  #: rows and columns of a picture


@dataclass(frozen=True)
class _Placed:
    """An object of the donor where it is pasted."""

    annotation: Annotation
    ops: list[Op]  #: from the donor to its h x w pixels
    area: Area  #: rows and columns of the picture
    alpha: npt.NDArray[np.uint8]  #: (h, w), covered part of each pixel, 0 to 255


def pasted(raw: RawSample, donor: RawSample, generator: np.random.Generator, most: int) -> RawSample:
    """`raw` with up to `most` objects of `donor` that have a mask, in a tile within its window.

    An object is mirrored or not, scaled by `SCALES`, and lies whole in the picture at a random place; one
    that is larger than the picture is left out. Of objects below it labels have the visible part, and those
    of which less than `LEAST_VISIBLE` of the mask (without one, of the box) is left have none. Crowds stay.
    """
    with_mask = [
        annotation
        for annotation in donor.annotations
        if not annotation["iscrowd"] and annotation.get("segmentation")
    ]
    count = int(generator.integers(0, most + 1))
    image = None
    if raw.image is not None:
        image = raw.image.copy()
    placed = list[_Placed]()
    for number in generator.permutation(len(with_mask))[:count].tolist():
        entry = _place(with_mask[number], donor, raw, generator)
        if entry is not None:
            placed.append(entry)
            if image is not None:
                assert donor.image is not None
                _blend(image[entry.area], donor.image, entry)
    return replace(raw, image=image, annotations=_visible(raw, placed))


def _place(
    annotation: Annotation, donor: RawSample, raw: RawSample, generator: np.random.Generator
) -> _Placed | None:
    """Draw where an object of the donor is pasted; None: it has no pixels there, or does not fit."""
    window = raw.window or Window(0, 0, *raw.size)
    factor = math.exp(generator.uniform(*np.log(SCALES)))
    factor *= math.sqrt(math.prod(raw.size) / math.prod(donor.size))
    crop = _around(annotation["bbox"], *donor.size)
    height = max(1, round(crop.height * factor))
    width = max(1, round(crop.width * factor))
    if crop.height < 1 or crop.width < 1 or height > window.height or width > window.width:
        return None
    ops: list[Op] = [crop]
    if generator.random() < 0.5:
        ops.append(Flip())
    ops.append(Resize(height, width))
    top = window.top + offset(window.height - height, generator)
    left = window.left + offset(window.width - width, generator)
    (alpha,) = draw_masks([annotation["segmentation"]], donor.size, ops, stride=1)
    if alpha.max() < HALF:
        return None
    return _Placed(annotation, ops, _slices(Crop(top, left, height, width)), alpha)


def _around(box: Any, height: int, width: int) -> Crop:
    """The pixels of a picture that a box (x, y, width, height) touches."""
    x, y, across, down = box
    top = max(0, math.floor(y))
    left = max(0, math.floor(x))
    bottom = min(height, math.ceil(y + down))
    right = min(width, math.ceil(x + across))
    return Crop(top, left, bottom - top, right - left)


def _blend(below: npt.NDArray[Any], donor: npt.NDArray[Any], placed: _Placed) -> None:
    """Draw an object over the pixels (h, w, n) where it is pasted."""
    above = apply_to_image(donor, placed.ops).permute(1, 2, 0).numpy()
    share = placed.alpha[..., None] / np.float32(255)
    mixed = below + (above.astype(np.float32) - below) * share
    if below.dtype == np.uint8:
        mixed = mixed.round()
    below[:] = mixed


def _visible(raw: RawSample, placed: Sequence[_Placed]) -> list[Annotation]:
    """Annotations of a picture below pasted objects, and of these objects, of which later ones hide earlier
    ones.
    """
    hidden = np.zeros(raw.size, dtype=bool)
    above = list[Annotation]()
    for entry in reversed(placed):
        mask = entry.alpha >= HALF
        visible = mask & ~hidden[entry.area]
        hidden[entry.area] |= mask
        if _is_enough(visible, mask):
            above.append(_labelled(entry.annotation, visible, entry.area, raw.size))
    below = list[Annotation]()
    for annotation in raw.annotations:
        crop = _around(annotation["bbox"], *raw.size)
        area = _slices(crop)
        if annotation["iscrowd"] or not hidden[area].any():
            below.append(annotation)
            continue
        x, y, width, height = annotation["bbox"]
        box = [[x, y, x + width, y, x + width, y + height, x, y + height]]
        outline = annotation.get("segmentation") or box
        mask = draw_masks([outline], raw.size, [crop], stride=1, samples=1)[0] > 0
        visible = mask & ~hidden[area]
        if np.array_equal(visible, mask):
            below.append(annotation)
        elif _is_enough(visible, mask):
            below.append(_labelled(annotation, visible, area, raw.size))
    return [*below, *reversed(above)]


def _slices(crop: Crop) -> Area:
    return slice(crop.top, crop.top + crop.height), slice(crop.left, crop.left + crop.width)


def _is_enough(visible: BoolArray, mask: BoolArray) -> bool:
    """Return True if enough of a mask is visible for a label."""
    return bool(visible.sum() >= LEAST_VISIBLE * mask.sum())


def _labelled(annotation: Annotation, visible: BoolArray, area: Area, size: Size) -> Annotation:
    """An annotation of the visible pixels (h, w), not none, of an `area` of a picture of `size`."""
    code = encode_mask(visible, area[0].start, area[1].start, size)
    bounds = {"bbox": coco_mask.toBbox(code).tolist(), "area": int(coco_mask.area(code))}
    masks = {"segmentation": code} if annotation.get("segmentation") else {}
    return {**annotation, **bounds, **masks}
