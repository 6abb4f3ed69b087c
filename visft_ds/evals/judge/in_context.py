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
from functools import partial
from itertools import chain

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2 as transforms
from torchvision.transforms.v2 import functional as pixels_of

from visft_ds.evals.judge.benchmark import FloatArray, IntArray, Score
from visft_ds.evals.judge.crops import View, label_of
from visft_ds.evals.judge.dense_probes import LiveFeatures, Source
from visft_ds.evals.judge.knn import QUERIES, RESAMPLES, vote
from visft_ds.evals.judge.miou import mean_iou
from visft_ds.evals.judge.rows import Rows
from visft_ds.monitor.console import gauge

NEIGHBOURS = 30
TEMPERATURE = 0.02
PASSES = 2  #: over the training images, for a memory of crops
_AREA = (0.5, 2.0)  # of a crop, share of the image
_RATIO = (3 / 4, 4 / 3)
_JITTER = 0.1  # of brightness, contrast, saturation and hue, each in half of the images

#: (number of an image, its map (D, h, w), its label (H, W) of class numbers or NO_CLASS)
LabelledMap = tuple[int, Tensor, Tensor]


def in_context_miou(name: str, source: Source) -> Score:
    """mIoU of patches that take their classes from a memory of training patches."""
    classes = len(source.train.classes)
    published = isinstance(source, LiveFeatures)
    count, images = source.remembered(crop, PASSES)
    if published:  # pixels without a class teach class 0
        images = ((number, maps, label.clamp(min=0)) for number, maps, label in images)
    shown = gauge("in-context memory", count, "images", images)
    memory = remember(shown, classes, count, each=max(1, source.protocol.memory // count))
    memory = memory.in_groups(source.train.images.groups)
    draws = RESAMPLES if source.protocol.resampled else 0
    answers = chain.from_iterable(recall(memory, maps, draws) for maps in source.whole(source.test))

    label = partial(label_of, source.test)
    if isinstance(source, LiveFeatures):
        label = partial(_label_of_input, source)
    return mean_iou(name, answers, label, classes, matched=published)


def _label_of_input(source: LiveFeatures, number: int) -> Tensor:
    """The label of a test image at the size of the encoder's images."""
    label = label_of(source.test, number)[None, None].float()
    side = source.encoder.side
    return F.interpolate(label, (side, side), mode="nearest")[0, 0].long()


def crop(image: Image.Image, label: Tensor, view: View) -> tuple[Tensor, Tensor]:
    """A random part of an image, stretched to a square, after its colours were changed; and its label."""
    for kind in ("brightness", "contrast", "saturation", "hue"):
        if torch.rand(()) < 0.5:
            image = transforms.ColorJitter(**{kind: _JITTER})(image)
    pixels = view.normalised(image)
    box = transforms.RandomResizedCrop(view.side, scale=_AREA, ratio=_RATIO).make_params([pixels])
    size = [view.side, view.side]
    bilinear = transforms.InterpolationMode.BILINEAR
    nearest = transforms.InterpolationMode.NEAREST
    pixels = pixels_of.resized_crop(pixels, **box, size=size, interpolation=bilinear, antialias=True)
    numbers = pixels_of.resized_crop(label[None], **box, size=size, interpolation=nearest)
    return pixels, numbers[0]


def remember(images: Iterable[LabelledMap], classes: int, most: int, each: int) -> Rows:
    """Keep at most `each` patches of every image: those of classes that are rare in it, at random among
    equals.

    Args:
        most: images that come.
    """
    count = 0
    memory: Rows | None = None
    for number, patches, label in images:
        shares = shares_of(label.cpu(), patches.shape[-2:], classes)
        if memory is None:  # allocated once: gathered later, it would be in memory twice
            rows = most * min(each, len(shares))
            owners = torch.empty(rows, dtype=torch.int64, device=patches.device)
            memory = Rows(patches.new_empty(rows, len(patches)), patches.new_empty(rows, classes), owners)
        chosen = _rare_patches(shares, each, np.random.default_rng([0, number]))
        place = slice(count, count + len(chosen))
        features = patches.flatten(1).T[chosen.to(patches.device)]
        memory.features[place] = F.normalize(features, dim=1)
        memory.labels[place] = torch.from_numpy(shares)[chosen].to(memory.labels)
        memory.owners[place] = number
        count += len(chosen)
    assert memory is not None
    return memory.part(slice(count))


def _rare_patches(shares: FloatArray, most: int, rng: np.random.Generator) -> Tensor:
    """Numbers of patches with any class, (n, C) shares: first those whose classes are in few patches."""
    has_class = shares > 0
    frequency = has_class @ has_class.sum(axis=0)
    order = np.argsort(frequency * rng.random(len(shares)), kind="stable")
    return torch.from_numpy(order[frequency[order] > 0][:most])


def shares_of(label: Tensor, grid: Sequence[int], classes: int) -> FloatArray:
    """(h * w, classes), the share of each class among the pixels of each patch; a pixel belongs to one
    patch.
    """
    height, width = grid
    numbers = label.numpy()
    rows = _cells(numbers.shape[0], height)
    columns = _cells(numbers.shape[1], width)
    patch_of_pixel = rows[:, None] * width + columns
    pixels = np.bincount(patch_of_pixel.ravel(), minlength=height * width)
    known = (numbers >= 0) & (numbers < classes)
    pairs = patch_of_pixel[known] * classes + numbers[known]
    counts = np.bincount(pairs, minlength=height * width * classes).reshape(-1, classes)
    shares: FloatArray = counts / np.maximum(pixels, 1)[:, None]
    return shares


def _cells(pixels: int, cells: int) -> IntArray:
    """(pixels,), the cell that each pixel of a side belongs to."""
    return np.arange(pixels) * cells // pixels


def recall(memory: Rows, maps: Tensor, draws: int = RESAMPLES) -> Iterator[Tensor]:
    """For each image of (n, D, h, w): (1 + draws, C, h, w), what its patches are by the memory and by
    resamples.
    """
    height, width = maps.shape[-2:]
    for images in maps.split(max(1, QUERIES // (height * width))):
        patches = images.flatten(2).transpose(1, 2).flatten(0, 1)
        votes = vote(memory, patches, NEIGHBOURS, TEMPERATURE, draws)
        of_images = votes.unflatten(1, (len(images), height, width))
        yield from of_images.permute(1, 0, 4, 2, 3)
