"""Predictions of semantic segmentation: a class for each pixel of an image, also from windows, and how good
they are.

Letters: B images, N windows, n of them of one image, C classes, Q queries, H W pixels of the stored image, h
w grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from visft_ds.data.masks import code_of
from visft_ds.data.samples import Batch
from visft_ds.data.transforms import Size
from visft_ds.tasks import Annotations, Numbers, Results, Truth
from visft_ds.tasks.classes import VOID
from visft_ds.tasks.masks.data import slices_of
from visft_ds.tasks.masks.interpolation import interpolated, interpolation
from visft_ds.tasks.masks.output import MaskOutput
from visft_ds.tasks.masks.rasters import decode_mask
from visft_ds.tasks.masks.regions import by_image
from visft_ds.tasks.semantic.head import SemanticOutput

Output = SemanticOutput | MaskOutput
ClassMap = npt.NDArray[np.uint8]  #: (H, W) numbers of classes or categories, VOID where there is none
_GROUP = 8  # classes whose scores are held at full size at a time


@dataclass(frozen=True)
class Windows:
    """The output of a head for squares out of a batch's images, along the longer side of each."""

    output: Output  #: of N windows
    starts: Sequence[Sequence[int]]  #: first pixels of each image's windows, in the image as it was evaluated
    frame: Sequence[int]  #: height and width of a window, with padding


def cut_windows(batch: Batch, side: int) -> tuple[Batch, list[list[int]]]:
    """A batch of squares of at most `side` pixels out of the images of another, and where those of each image
    begin.

    As in EoMT's and PMT's code: as few as cover the longer side, evenly spaced. Windows of a smaller image
    are as large as it, with the padding of its transform.
    """
    height, width = (min(side, length) for length in batch.images.shape[-2:])
    pixels: list[Tensor] = []
    starts: list[list[int]] = []
    owners: list[int] = []
    for number, (image, size) in enumerate(zip(batch.images, batch.sizes.tolist(), strict=True)):
        longer = max(size)
        count = -(-longer // side)
        step = (longer - side) / max(1, count - 1)
        starts.append([int(window * step) for window in range(count)])
        for start in starts[-1]:
            top, left = (start, 0) if _axis(size) == 0 else (0, start)
            pixels.append(image[:, top : top + height, left : left + width])
            owners.append(number)
    windows = batch.of_images(torch.tensor(owners))
    cut = replace(
        windows,
        images=torch.stack(pixels),
        sizes=windows.sizes.clamp(max=side),
        frames=None if windows.frames is None else windows.frames.clamp(max=side),
        targets=batch.targets,
    )
    return cut, starts


def _axis(size: Sequence[int]) -> int:
    """The axis along which an image of this height and width is cut."""
    return 0 if size[0] > size[1] else 1


@torch.no_grad()
def semantic_results(output: Output | Windows, batch: Batch, classes: Sequence[int] | None = None) -> Results:
    """Predictions in COCO's results format: image_id, category_id, segmentation, one for each class of an
    image.

    segmentation is a run-length code at the size of the stored image, its counts as str; category_id is the
    entry of `classes` for the class, or its place. The probabilities of the classes are interpolated to that
    size, where windows overlap their mean, and the most probable one is taken. Masks are interpolated to the
    image as it was evaluated; a class has there the sum over queries of its probability times the mask's.
    Images without `batch.real` are left out.
    """
    results = Results()
    for image in batch.real_images():
        class_map = _class_map(output, batch, image)
        for label in np.unique(class_map).tolist():
            results.append(
                {
                    "image_id": int(batch.image_ids[image]),
                    "category_id": classes[label] if classes else label,
                    "segmentation": code_of(class_map == label),
                }
            )
    return results


def _class_map(output: Output | Windows, batch: Batch, image: int) -> ClassMap:
    """(H, W) most probable class of each pixel of an image."""
    stored = batch.original_sizes[image].tolist()
    size = batch.sizes[image].tolist()
    if isinstance(output, Windows):
        rows = slices_of([len(starts) for starts in output.starts])[image]
        maps, weights, shares = _scores(output.output, rows, size, output.frame)
        matrices = _merging(maps, shares, size, output, image, stored)
    else:
        rows = slice(image, image + 1)
        maps, weights, shares = _scores(output, rows, size, batch.images.shape[-2:])
        matrices = [interpolation(maps.shape[2 + axis], shares[axis], stored[axis], maps) for axis in (0, 1)]
    return most_probable(maps, weights, _axis(size), *matrices)


def _scores(
    output: Output,
    rows: slice,
    size: Sequence[int],
    frame: Sequence[int],
) -> tuple[Tensor, Tensor | None, Sequence[float]]:
    """Probabilities in an image of this size, from some rows of an output of padded `frame`s: all of the
    image, or its windows.

    Returns:
        probabilities of classes (n, C, h, w), or of masks (n, Q, h, w); the probabilities of their classes
        (n, C, Q), or None; the share of (h, w) that shows image.
    """
    covered = [min(length, whole) for length, whole in zip(size, frame, strict=True)]
    shares = output.extents[rows.start].tolist()  # those of the windows of an image are alike
    if isinstance(output, SemanticOutput):
        return output.logits[rows].softmax(dim=1), None, shares
    masks = output.masks[-1, rows]
    weights = output.logits[-1, rows].softmax(dim=-1)[..., :-1].transpose(1, 2)
    return interpolated(masks, shares, covered).sigmoid(), weights, [1.0, 1.0]


def _merging(
    maps: Tensor,
    shares: Sequence[float],
    size: Sequence[int],
    windows: Windows,
    image: int,
    stored: Sequence[int],
) -> list[Tensor]:
    """A matrix (stored, n * cells) along the axis of the windows, and one (stored, cells) along the other.

    Each window is interpolated to its own pixels of the image as it was evaluated (`size`), where windows
    overlap the mean is taken, and all of it is interpolated to the stored size.
    """
    matrices = []
    for axis in (0, 1):
        starts = windows.starts[image] if axis == _axis(size) else [0]
        cells = maps.shape[2 + axis]
        pixels = min(size[axis], windows.frame[axis])
        of_window = interpolation(cells, shares[axis], pixels, maps)
        merged = of_window.new_zeros(size[axis], len(starts) * cells)
        for number, start in enumerate(starts):
            merged[start : start + pixels, number * cells : (number + 1) * cells] = of_window
        mean = merged / merged.sum(dim=1, keepdim=True)
        matrices.append(interpolation(size[axis], 1.0, stored[axis], maps) @ mean)
    return matrices


def most_probable(
    maps: Tensor,
    weights: Tensor | None,
    axis: int,
    rows: Tensor,
    columns: Tensor,
) -> ClassMap:
    """(H, W) best class of maps of n windows, which lie one after the other along an axis.

    The maps are probabilities (n, C, h, w), or masks (n, Q, h, w), whose `weights` (n, C, Q) are the
    classes'. They are interpolated by `rows` (H, h), or (H, n * h), and `columns`.
    """
    num_classes = maps.shape[1] if weights is None else weights.shape[1]
    best_scores = []
    best_classes = []
    for first in range(0, num_classes, _GROUP):
        group = slice(first, first + _GROUP)  # never all classes at full size
        scores = maps[:, group]
        if weights is not None:
            scores = torch.einsum("ncq,nqhw->nchw", weights[:, group], maps)
        side_by_side = torch.cat([*scores], dim=1 + axis)
        score, label = (rows @ side_by_side @ columns.T).max(dim=0)
        best_scores.append(score)
        best_classes.append((label + first).to(torch.uint8))
    best_group = torch.stack(best_scores).argmax(dim=0, keepdim=True)
    class_map: ClassMap = torch.stack(best_classes).gather(0, best_group)[0].cpu().numpy()
    return class_map


def number_map(entries: Annotations, size: Size, numbers: Mapping[int, int]) -> ClassMap:
    """(H, W) numbers of the categories of annotations or results of an image, VOID where there is none."""
    class_map = np.full(size, VOID, dtype=np.uint8)
    for entry in entries:
        if entry["category_id"] in numbers and entry.get("segmentation"):
            class_map[decode_mask(entry["segmentation"], size)] = numbers[entry["category_id"]]
    return class_map


def measure_semantic(truth: Truth, results: Results, per_category: bool) -> Numbers:
    """Mean IoU over the classes that the labels or the predictions have, accuracy of the labelled pixels; in
    [0, 1].

    With `per_category` also `semantic/IoU/<category name>`, -1 where neither has it. All images count
    together, pixel by pixel at their stored size. `truth` is a COCO dictionary; unlabelled pixels are left
    out.

    Raises ValueError without labelled pixels.
    """
    confusion = _confusion(truth, results)
    if not confusion.any():
        raise ValueError("the data has no labelled pixel, which predictions are compared with")
    intersection = confusion.diagonal()
    union = confusion.sum(axis=1) + confusion[:, :-1].sum(axis=0) - intersection
    ious = np.where(union > 0, intersection / union.clip(min=1), -1)
    metrics = {
        "semantic/mIoU": float(ious[union > 0].mean()),
        "semantic/accuracy": float(intersection.sum() / confusion.sum()),
    }
    if per_category:
        for category, iou in zip(truth["categories"], ious, strict=True):
            metrics[f"semantic/IoU/{category['name']}"] = float(iou)
    return metrics


def _confusion(truth: Truth, results: Results) -> npt.NDArray[np.int64]:
    """(C, C + 1) pixels by their true class and the predicted one, the last of which is none that the data
    has.
    """
    numbers = {int(category["id"]): number for number, category in enumerate(truth["categories"])}
    count = len(numbers)
    labelled = by_image(truth["annotations"])
    predicted = by_image(results)
    confusion = np.zeros((count, count + 1), dtype=np.int64)
    for image in truth["images"]:
        size = image["height"], image["width"]
        true = number_map(labelled[image["id"]], size, numbers)
        answer = number_map(predicted[image["id"]], size, numbers)
        known = true != VOID
        rows = true[known].astype(np.int64)
        columns = answer[known].clip(max=count)
        pixels = np.bincount(rows * (count + 1) + columns, minlength=confusion.size)
        confusion += pixels.reshape(confusion.shape)
    return confusion
