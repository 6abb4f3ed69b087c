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

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2 as transforms
from torchvision.transforms.v2 import functional as pixels_of

from visft_ds.evals.judge.benchmark import FloatArray, Score
from visft_ds.evals.judge.crops import coin, label_of
from visft_ds.evals.judge.dense_probes import Example, LiveFeatures, Source
from visft_ds.evals.judge.encoders import Encoder
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


def in_context_miou(name: str, source: Source) -> Score:
    """mIoU of patches that take their classes from a memory of training patches."""
    classes = len(source.train.classes)
    count, images = source.remembered(crop, PASSES)
    shown = gauge("in-context memory", count, "images", images)
    patches_of_image = max(1, source.protocol.memory // count)
    memory = remember(shown, classes, count, patches_of_image)
    memory = memory.in_groups(source.train.images.groups)
    draws = RESAMPLES if source.protocol.resampled else 0
    answers = recall(memory, source.whole(source.test), draws)
    label = partial(label_of, source.test)
    if isinstance(source, LiveFeatures):
        label = partial(_label_of_input, source)
    return mean_iou(name, answers, label, classes, matched=source.protocol.published)


def _label_of_input(source: LiveFeatures, number: int) -> Tensor:
    """The label of a test image at the size of the encoder's images."""
    label = label_of(source.test, number)
    side = source.encoder.side
    resized = F.interpolate(label[None, None].float(), (side, side), mode="nearest")
    return resized[0, 0].long()


def crop(image: Image.Image, label: Tensor, encoder: Encoder) -> tuple[Tensor, Tensor]:
    """A random part of an image, stretched to a square, after its colours were changed; and its label, in
    which pixels without a class are class 0.
    """
    for kind in ("brightness", "contrast", "saturation", "hue"):
        if coin():
            image = transforms.ColorJitter(**{kind: _JITTER})(image)
    pixels = encoder.normalised(image)
    random_crop = transforms.RandomResizedCrop(encoder.side, scale=_AREA, ratio=_RATIO)
    box = random_crop.make_params([pixels]) | {"size": [encoder.side, encoder.side]}
    nearest = transforms.InterpolationMode.NEAREST
    pixels = pixels_of.resized_crop(pixels, **box, antialias=True)
    numbers = pixels_of.resized_crop(label[None], **box, interpolation=nearest)
    return pixels, numbers[0].clamp(min=0)


def remember(images: Iterable[Example], classes: int, most: int, each: int) -> Rows:
    """Keep at most `each` patches of every image: those of classes that are rare in it, at random among
    equals.

    Args:
        most: images that come.

    Raises:
        ValueError: a GPU has no room for them.
    """
    count = 0
    memory: Rows | None = None
    for number, patches, label in images:
        channels, height, width = patches.shape
        shares = shares_of(label.cpu(), (height, width), classes)
        if memory is None:  # allocated once: gathered later, it would be in memory twice
            rows = most * min(each, len(shares))
            try:
                memory = Rows(
                    features=patches.new_empty(rows, channels),
                    labels=patches.new_empty(rows, classes),
                    owners=patches.new_empty(rows, dtype=torch.int64),
                )
            except torch.OutOfMemoryError as error:
                raise ValueError(
                    f"{patches.device} has no room for a memory of {rows:,} patches: take a larger GPU, or "
                    "give --quick"
                ) from error
        chosen = _rare_patches(shares, each, np.random.default_rng([0, number]))
        rows_of_image = slice(count, count + len(chosen))
        features = patches.flatten(1).T[chosen.to(patches.device)]
        memory.features[rows_of_image] = F.normalize(features, dim=1)
        memory.labels[rows_of_image] = torch.from_numpy(shares[chosen]).to(memory.labels)
        memory.owners[rows_of_image] = number
        count += len(chosen)
    assert memory is not None
    return memory.subset(slice(count))


def _rare_patches(shares: FloatArray, most: int, rng: np.random.Generator) -> Tensor:
    """Numbers of patches with any class, (n, C) shares: first those whose classes are in few patches."""
    has_class = shares > 0
    frequency = has_class @ has_class.sum(axis=0)
    key = frequency * rng.random(len(shares))
    order = np.argsort(key, kind="stable")
    is_labelled = frequency[order] > 0
    return torch.from_numpy(order[is_labelled][:most])


def shares_of(label: Tensor, grid: Sequence[int], classes: int) -> FloatArray:
    """(h * w, classes), the share of each class among the pixels of each patch; a pixel belongs to one
    patch.
    """
    height, width = grid
    numbers = label.numpy()
    rows = np.arange(numbers.shape[0]) * height // numbers.shape[0]
    columns = np.arange(numbers.shape[1]) * width // numbers.shape[1]
    patch_of_pixel = rows[:, None] * width + columns
    pixels = np.bincount(patch_of_pixel.ravel(), minlength=height * width)
    has_class = (numbers >= 0) & (numbers < classes)
    pairs = patch_of_pixel[has_class] * classes + numbers[has_class]
    counts = np.bincount(pairs, minlength=height * width * classes)
    shares: FloatArray = counts.reshape(-1, classes) / np.maximum(pixels, 1)[:, None]
    return shares


def recall(memory: Rows, batches: Iterable[Tensor], draws: int = RESAMPLES) -> Iterator[Tensor]:
    """For each image of batches (n, D, h, w): (1 + draws, C, h, w), what its patches are by the memory and by
    resamples.
    """
    for batch in batches:
        height, width = batch.shape[-2:]
        for images in batch.split(max(1, QUERIES // (height * width))):
            patches = images.flatten(2).mT.flatten(0, 1)
            votes = vote(memory, patches, NEIGHBOURS, TEMPERATURE, draws)
            of_images = votes.unflatten(1, (len(images), height, width))
            yield from of_images.permute(1, 0, 4, 2, 3)
