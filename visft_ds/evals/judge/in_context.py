"""In-context segmentation: nothing is trained, a patch takes its classes from the most similar training
patches.

Hummingbird's dense retrieval (https://arxiv.org/abs/2306.01667), as vpariza/open-hummingbird-eval runs it:
hbird/hbird_eval.py, hbird/utils/transforms.py, hbird/utils/eval_metrics.py. A patch in memory has the shares
of the classes among its pixels; the 30 nearest by cosine count by softmax(similarity / 0.02).

Published: PASSES augmented passes over the training images fill a memory of at most 10,240,000 patches, in
which pixels without a class are class 0. Labels are judged at the size of the images, after a one-to-one
matching of answers to classes (Hungarian), and a class that does not occur counts as 0.

Differs from the source in: search is exact (there quantised, by ScaNN); all images take part (there not the
last incomplete batch of each part); pixels are normalised as the model was trained (there 0.255 stands for
the 0.225 of blue); of ADE20k, pixels without a class are class 0 of 150 (there a class of their own, of 151).

With --quick, a pixel without a class has a share in none, and patches without any other are not kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2 as transforms
from torchvision.transforms.v2 import functional as pixels_of

from visft_ds.evals.judge.benchmark import FloatArray, IntArray
from visft_ds.evals.judge.crops import View
from visft_ds.evals.judge.neighbours import RESAMPLES, ROWS, Rows, vote

NEIGHBOURS = 30
TEMPERATURE = 0.02
PASSES = 2  #: over the training images, for a memory of crops
_AREA = (0.5, 2.0)  # of a crop, share of the image
_RATIO = (3 / 4, 4 / 3)
_JITTER = 0.1  # of brightness, contrast, saturation and hue, each in half of the images


def crop(image: Image.Image, label: Tensor, view: View) -> tuple[Tensor, Tensor]:
    """A random part of an image, stretched to a square, after its colours were changed; and its label."""
    for kind in ("brightness", "contrast", "saturation", "hue"):
        if torch.rand(()) < 0.5:
            image = transforms.ColorJitter(**{kind: _JITTER})(image)
    pixels = view.normalised(image)
    box = transforms.RandomResizedCrop(view.side, scale=_AREA, ratio=_RATIO).make_params([pixels])
    where = (box["top"], box["left"], box["height"], box["width"])
    size = [view.side, view.side]
    bilinear, nearest = transforms.InterpolationMode.BILINEAR, transforms.InterpolationMode.NEAREST
    part = pixels_of.resized_crop(pixels, *where, size, interpolation=bilinear, antialias=True)
    return part, pixels_of.resized_crop(label[None], *where, size, interpolation=nearest)[0]


def remember(images: Iterable[tuple[int, Tensor, Tensor]], classes: int, most: int, each: int) -> Rows:
    """Keep at most `each` patches of every image: those of classes that are rare in it, at random among
    equals.

    Args:
        images: (number of the image, its map (D, h, w), its label (H, W) of class numbers or NO_CLASS).
        most: images that come.
    """
    kept = 0
    features, labels, owners = (torch.empty(0) for _ in range(3))
    for number, patches, label in images:
        shares = shares_of(label.cpu(), patches.shape[-2:], classes)
        frequency = (shares > 0) @ (shares > 0).sum(axis=0)
        order = np.argsort(frequency * np.random.default_rng([0, number]).random(len(shares)), kind="stable")
        chosen = torch.from_numpy(order[frequency[order] > 0][:each])
        if not len(owners):  # once: gathered later, they would be in memory twice
            rows = most * min(each, len(shares))
            features = patches.new_empty(rows, len(patches))
            labels = patches.new_empty(rows, classes)
            owners = torch.empty(rows, dtype=torch.int64, device=patches.device)
        place = slice(kept, kept + len(chosen))
        features[place] = F.normalize(patches.flatten(1).T[chosen.to(patches.device)], dim=1)
        labels[place] = torch.from_numpy(shares)[chosen].to(labels)
        owners[place] = number
        kept += len(chosen)
    return Rows(features[:kept], labels[:kept], owners[:kept])


def shares_of(label: Tensor, grid: Sequence[int], classes: int) -> FloatArray:
    """(h * w, classes), the share of each class among the pixels of each patch; a pixel belongs to one
    patch.
    """
    rows, columns = (np.arange(size) * cells // size for size, cells in zip(label.shape, grid, strict=True))
    numbers = label.numpy()
    numbers = np.where((numbers >= 0) & (numbers < classes), numbers, classes)
    bins = (rows[:, None] * grid[1] + columns) * (classes + 1) + numbers
    counts = np.bincount(bins.ravel(), minlength=grid[0] * grid[1] * (classes + 1)).reshape(-1, classes + 1)
    shares: FloatArray = counts[:, :classes] / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    return shares


def recall(memory: Rows, maps: Tensor, draws: int = RESAMPLES) -> Iterator[Tensor]:
    """For each image of (n, D, h, w): (1 + draws, C, h, w), what its patches are by the memory and by
    resamples.
    """
    for images in maps.split(max(1, ROWS // maps[0, 0].numel())):
        queries = images.flatten(2).transpose(1, 2).flatten(0, 1)
        votes = vote(memory, queries, NEIGHBOURS, TEMPERATURE, draws)
        yield from votes.unflatten(1, (len(images), *maps.shape[-2:])).permute(1, 0, 4, 2, 3)


def matching(counts: Tensor) -> IntArray:
    """(C,), the class that each answer stands for, of counts (C answers, C classes) of pixels.

    One for each, so that the sum of the intersections over unions is largest.
    """
    both = counts.double().numpy()
    union = both.sum(axis=0, keepdims=True) + both.sum(axis=1, keepdims=True) - both
    answers, classes = linear_sum_assignment(both / np.maximum(union, 1e-8), maximize=True)
    order: IntArray = classes[np.argsort(answers)]
    return order
