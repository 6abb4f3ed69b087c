"""Mean intersection over union of maps that are smaller than the labels.

mIoU is the mean over classes of intersection over union, both summed over the images, at the labels' own
size; pixels without a class count nowhere. Resamples of the training images are judged on every _STRIDE-th
pixel of every _STRIDE-th row: only their spread is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from visft_ds.evals.judge.benchmark import Score, mean_ratio
from visft_ds.evals.judge.crops import NO_CLASS
from visft_ds.evals.judge.heads import enlarged

_STRIDE = 4  # between the pixels that resamples are judged on
_SMALL = 112  # pixels of the side of a segmentation that is kept for the sheet


def mean_iou(
    name: str,
    maps: Iterable[Tensor],
    label: Callable[[int], Tensor],
    classes: int,
    *,
    matched: bool = False,
) -> Score:
    """Score of the maps of each test image, (1 + resamples, classes, h, w): by all training images, and by
    resamples of them. The largest class of a pixel is the answer.

    Args:
        label: number of an image -> (H, W) class numbers, or NO_CLASS.
        matched: answers are renamed by `matching`, and a class that is nowhere counts as 0.
    """
    of_images = []  # (answers, classes) pixels of each image
    total = torch.tensor(0)  # (1 + resamples, answers, classes) pixels of all images
    small = []
    for number, outputs in enumerate(maps):
        truth = label(number).to(outputs.device)
        answers = largest(outputs[:1], truth.shape)
        counts = confusion(answers, truth, classes)
        of_images.append(counts[0].cpu().to_sparse())
        if len(outputs) > 1:
            sparse_answers = largest(outputs[1:], truth.shape, _STRIDE)
            sparse_truth = truth[::_STRIDE, ::_STRIDE]
            counts = torch.cat([counts, confusion(sparse_answers, sparse_truth, classes)])
        total = total + counts.cpu()
        resized = F.interpolate(answers[None].float(), (_SMALL, _SMALL), mode="nearest-exact")
        small.append(resized[0, 0].cpu())
    segmented = torch.stack(small).long()
    answer_of_class = torch.arange(classes)
    if matched:
        class_of_answer = matching(total[0])
        segmented = class_of_answer[segmented]
        answer_of_class = class_of_answer.argsort()
        total = torch.stack([counts[matching(counts).argsort()] for counts in total])
    each = [_intersection_and_union(counts.to_dense()[answer_of_class]) for counts in of_images]
    values = torch.stack(each).double().numpy()
    sums = _intersection_and_union(total).double().numpy()
    if matched:
        is_nowhere = sums[:, 1] == 0
        values[:, 1, is_nowhere[0]] = 1
        sums[:, 1][is_nowhere] = 1
    small_maps = segmented.numpy().astype(np.int16)
    return Score(name, values, maps=small_maps, retrained=mean_ratio(sums[1:]))


def matching(counts: Tensor) -> Tensor:
    """(C,), the class that each answer stands for, of counts (C answers, C classes) of pixels.

    One for each, so that the sum of the intersections over unions is largest (Hungarian).
    """
    intersection = counts.double().numpy()
    answered = intersection.sum(axis=1, keepdims=True)
    present = intersection.sum(axis=0, keepdims=True)
    union = answered + present - intersection
    _, classes = linear_sum_assignment(intersection / np.maximum(union, 1e-8), maximize=True)
    return torch.from_numpy(classes)


def _intersection_and_union(counts: Tensor) -> Tensor:
    """(..., 2, classes) of each class, of counts (..., answers, classes)."""
    intersection = counts.diagonal(dim1=-2, dim2=-1)
    answered = counts.sum(dim=-1)
    present = counts.sum(dim=-2)
    return torch.stack([intersection, answered + present - intersection], dim=-2)


def confusion(answers: Tensor, truth: Tensor, classes: int) -> Tensor:
    """(heads, answers, classes) pixels, of answers (heads, H, W); those without a class are left out."""
    # Pixels without a class are counted behind all pairs, and cut off: selecting the others takes three times
    # as long.
    pairs_of_classes = classes**2
    truth = truth.masked_fill(truth == NO_CLASS, pairs_of_classes)
    counts = []
    for of_head in answers:
        pairs = (of_head * classes + truth).flatten()
        table = pairs.bincount(minlength=pairs_of_classes)[:pairs_of_classes]
        counts.append(table.view(classes, classes))
    return torch.stack(counts)


def largest(maps: Tensor, size: Sequence[int], stride: int = 1) -> Tensor:
    """(heads, H, W), the class that is largest in each pixel of maps (heads, C, h, w), enlarged to a size."""
    answers = []
    for of_head, possible in zip(maps, contenders(maps), strict=True):
        classes = possible.nonzero()[:, 0]
        large = enlarged(of_head[classes], size, stride)
        answers.append(classes[large.max(dim=0).indices])  # three times as fast as argmax
    return torch.stack(answers)


def contenders(maps: Tensor) -> Tensor:
    """(heads, C) of bool, the classes that may be the largest in a pixel of enlarged maps (heads, C, h, w).

    A pixel mixes four patches, whose winners' mean is beaten by the largest there. A class that is below this
    mean in all four patches has lost between them; most have, everywhere, and need not be enlarged.
    """
    padded = F.pad(maps, (1, 1, 1, 1), mode="replicate")
    corners = F.unfold(padded, 2).unflatten(1, (-1, 4))  # (heads, C, 4 corners, places between patches)
    winners = corners.argmax(dim=1)
    of_winners = corners.gather(1, winners[:, :, None].expand(-1, -1, 4, -1))  # (heads, 4 winners, 4, places)
    rounding = 1e-5 * maps.abs().max()
    least = of_winners.mean(dim=1, keepdim=True) - rounding
    return (corners >= least).flatten(2).any(dim=2)
