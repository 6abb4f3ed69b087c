"""Predictions of semantic segmentation: a class for each pixel of an image, also from windows, and how good
they are.

Letters: B images, N windows, n of them of one image, C classes, Q queries, H W pixels of the stored image, h
w grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from faster_coco_eval import mask as coco_mask  # pycocotools' decode() warns under NumPy 2
from scipy import ndimage
from torch import Tensor

from visft_ds.data.samples import Batch
from visft_ds.tasks import Results
from visft_ds.tasks.classes import VOID, category_name
from visft_ds.tasks.masks.interpolation import interpolation
from visft_ds.tasks.masks.output import SegmentationOutput
from visft_ds.tasks.masks.rasters import decode_mask
from visft_ds.tasks.pictures import SIDE, TEXT, Picture, draw_objects, letters, palette
from visft_ds.tasks.semantic.head import SemanticOutput

Places = npt.NDArray[np.uint8]  #: (H, W) places among classes or names, VOID where there is none
_GROUP = 8  # classes whose scores are held at full size at a time
_TAGGED = 0.003  # share of an image from which on a region has its name in a picture


@dataclass(frozen=True)
class Windows:
    """The output of a head for squares out of a batch's images, along the longer side of each."""

    output: SemanticOutput | SegmentationOutput  #: of N windows
    starts: Sequence[Sequence[int]]  #: first pixels of each image's windows, in the image as it was evaluated
    frame: Sequence[int]  #: height and width of a window, with padding


def cut_windows(batch: Batch, side: int) -> tuple[Batch, list[list[int]]]:
    """A batch of squares of at most `side` pixels out of the images of another, and where those of each image
    begin.

    As in EoMT's and PMT's code: as few as cover the longer side, evenly spaced. Windows of a smaller image
    are as large as it, with the padding of its transform.
    """
    height, width = (min(side, whole) for whole in batch.images.shape[-2:])
    pixels, starts = list[Tensor](), list[list[int]]()
    for image, size in zip(batch.images, batch.sizes.tolist(), strict=True):
        longer = max(size)
        count = -(-longer // side)
        starts.append([int(number * (longer - side) / max(1, count - 1)) for number in range(count)])
        for start in starts[-1]:
            top, left = (start, 0) if size[0] > size[1] else (0, start)
            pixels.append(image[:, top : top + height, left : left + width])
    windows = batch.of_images(torch.tensor([number for number, places in enumerate(starts) for _ in places]))
    frames = None if windows.frames is None else windows.frames.clamp(max=side)
    cut = replace(windows, images=torch.stack(pixels), sizes=windows.sizes.clamp(max=side), frames=frames)
    return replace(cut, targets=batch.targets), starts


@torch.no_grad()
def semantic_results(
    output: SemanticOutput | SegmentationOutput | Windows, batch: Batch, classes: Sequence[int] | None = None
) -> Results:
    """Predictions in COCO's results format: image_id, category_id, segmentation, one for each class of an
    image.

    segmentation is a run-length code at the size of the stored image, its counts as str; category_id is the
    entry of `classes` for the class, or its place. The probabilities of the classes are interpolated to that
    size, where windows overlap their mean, and the most probable one is taken. Masks are interpolated to the
    image as it was evaluated; a class has there the sum over queries of its probability times the mask's.
    Images without `batch.real` are left out.
    """
    found = Results()
    for image in batch.real.nonzero().flatten().tolist():
        stored, size = batch.original_sizes[image].tolist(), batch.sizes[image].tolist()
        if isinstance(output, Windows):
            made, starts, frame = output.output, output.starts[image], output.frame
            first = sum(map(len, output.starts[:image]))
        else:
            made, starts, first, frame = output, [0], image, batch.images.shape[-2:]
        covered = [min(one, whole) for one, whole in zip(size, frame, strict=True)]
        if made.extents is None:
            shares = [one / whole for one, whole in zip(covered, frame, strict=True)]
        else:  # those of the windows of an image are alike
            shares = made.extents[first].tolist()
        own = slice(first, first + len(starts))
        if isinstance(made, SemanticOutput):
            maps, weights = made.logits[own].softmax(dim=1), None
        else:
            masks, weights = (
                made.masks[-1, own],
                made.logits[-1, own].softmax(dim=-1)[..., :-1].transpose(1, 2),
            )
            rows, columns = (interpolation(masks.shape[2 + a], shares[a], covered[a], masks) for a in (0, 1))
            maps, shares = (rows @ masks @ columns.T).sigmoid(), [1.0, 1.0]
        along = 0 if size[0] > size[1] else 1
        matrices = []
        for axis in (0, 1):
            cells, pixels = maps.shape[2 + axis], stored[axis]
            if isinstance(output, Windows):
                fine = interpolation(cells, shares[axis], covered[axis], maps)
                matrices.append(_merging(fine, size[axis], starts if axis == along else [0], pixels))
            else:
                matrices.append(interpolation(cells, shares[axis], pixels, maps))
        places = most_probable(maps, weights, along, *matrices)
        for place in np.unique(places).tolist():
            code = coco_mask.encode(np.asfortranarray(places == place).view(np.uint8))
            about = {
                "image_id": int(batch.image_ids[image]),
                "category_id": classes[place] if classes else place,
            }
            found.append(
                {**about, "segmentation": {"size": stored, "counts": code["counts"].decode("ascii")}}
            )
    return found


def _merging(fine: Tensor, size: int, starts: Sequence[int], stored: int) -> Tensor:
    """Matrix (stored, len(starts) * cells) from cells of windows along an axis, one window after the other,
    to pixels.

    Each window is interpolated to its own pixels (`fine`) of the image as it was evaluated (`size`), where
    windows overlap the mean is taken, and all of it is interpolated to the stored size.
    """
    covered, cells = fine.shape
    merged = fine.new_zeros(size, len(starts) * cells)
    for number, start in enumerate(starts):
        merged[start : start + covered, number * cells : (number + 1) * cells] = fine
    return interpolation(size, 1.0, stored, fine) @ (merged / merged.sum(dim=1, keepdim=True))


def most_probable(maps: Tensor, weights: Tensor | None, along: int, rows: Tensor, columns: Tensor) -> Places:
    """(H, W) best class of maps of n windows, which lie one after the other along an axis.

    The maps are probabilities (n, C, h, w), or masks (n, Q, h, w), whose `weights` (n, C, Q) are the
    classes'. They are interpolated by `rows` (H, h), or (H, n * h), and `columns`.
    """
    tops, bests = list[Tensor](), list[Tensor]()
    for first in range(0, maps.shape[1] if weights is None else weights.shape[1], _GROUP):
        group = slice(first, first + _GROUP)  # never all classes at full size
        scores = (
            maps[:, group] if weights is None else torch.einsum("ncq,nqhw->nchw", weights[:, group], maps)
        )
        top, best = (rows @ torch.cat([*scores], dim=1 + along) @ columns.T).max(dim=0)
        tops.append(top)
        bests.append((best + first).to(torch.uint8))
    chosen = torch.stack(tops).argmax(dim=0, keepdim=True)
    places: Places = torch.stack(bests).gather(0, chosen)[0].cpu().numpy()
    return places


def place_map(
    annotations: Sequence[Mapping[str, Any]], size: tuple[int, int], places: Mapping[int, int]
) -> Places:
    """(H, W) places of the categories of annotations or results of an image, VOID where there is none."""
    found = np.full(size, VOID, dtype=np.uint8)
    for one in annotations:
        if one["category_id"] in places and one.get("segmentation"):
            found[decode_mask(one["segmentation"], size)] = places[one["category_id"]]
    return found


def measure_semantic(truth: Mapping[str, Any], results: Results, per_category: bool) -> dict[str, float]:
    """Mean IoU over the classes that the labels or the predictions have, accuracy of the labelled pixels; in
    [0, 1].

    With `per_category` also `semantic/IoU/<category name>`, -1 where neither has it. All images count
    together, pixel by pixel at their stored size. `truth` is a COCO dictionary; unlabelled pixels are left
    out.

    Raises ValueError without labelled pixels.
    """
    names = {int(category["id"]): str(category["name"]) for category in truth["categories"]}
    places, count = {number: place for place, number in enumerate(names)}, len(names)
    labelled, predicted = _by_image(truth["annotations"]), _by_image(results)
    table = np.zeros(
        (count, count + 1), dtype=np.int64
    )  # true class, predicted class or none that the data has
    for image in truth["images"]:
        size = image["height"], image["width"]
        true = place_map(labelled.get(image["id"], ()), size, places).astype(np.int64)
        found = place_map(predicted.get(image["id"], ()), size, places).clip(max=count)
        known = true != VOID
        pairs = true[known] * (count + 1) + found[known]
        table += np.bincount(pairs, minlength=table.size).reshape(table.shape)
    if not table.any():
        raise ValueError("the data has no labelled pixel, which predictions are compared with")
    both = table.diagonal()
    either = table.sum(axis=1) + table[:, :-1].sum(axis=0) - both
    ious = np.where(either > 0, both / either.clip(min=1), -1)
    measures = {
        "semantic/mIoU": float(ious[either > 0].mean()),
        "semantic/accuracy": float(both.sum() / table.sum()),
    }
    own = {f"semantic/IoU/{name}": float(iou) for name, iou in zip(names.values(), ious, strict=True)}
    return {**measures, **(own if per_category else {})}


def _by_image(entries: Sequence[Mapping[str, Any]]) -> dict[int, list[Mapping[str, Any]]]:
    found: dict[int, list[Mapping[str, Any]]] = {}
    for one in entries:
        found.setdefault(one["image_id"], []).append(one)
    return found


def draw_regions(
    image: Picture, found: Sequence[Mapping[str, Any]], names: Mapping[int, str], side: int = SIDE
) -> Picture:
    """The image under the colours of its classes, each with its name where its region is widest."""
    masks, tags, corners = list[npt.NDArray[np.bool_]](), list[str](), list[tuple[float, ...]]()
    scale = side / max(image.shape[:2])
    of_names = [category_name(one["category_id"], names) for one in found]
    for one, name in zip(found, of_names, strict=True):
        masks.append(decode_mask(one["segmentation"], image.shape[:2]))
        inner = ndimage.distance_transform_edt(np.pad(masks[-1], 1))[1:-1, 1:-1]
        y, x = np.unravel_index(inner.argmax(), inner.shape)
        tags.append(name if masks[-1].mean() >= _TAGGED else "")
        corners.append((x - letters(TEXT).getlength(name) / 2 / scale, y - TEXT / 2 / scale, 0, 0))
    colours = palette([*names.values(), *of_names])
    return draw_objects(image, of_names, tags, colours, boxes=corners, masks=masks, side=side)
