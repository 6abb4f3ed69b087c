"""Classification by few images a class: the nearest of the classes' means, as SimpleShot takes it
(https://arxiv.org/abs/1911.04623, its CL2N): features are centred and divided by their length.

Training images are drawn ten times, the same ones for every model; those of fewer shots are among those of
more. The number is the mean of the draws. Only half of the images of a class, or of the groups that they come
from, are ever drawn, since draws of all that there is would hardly differ.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from visft_ds.evals.judge.benchmark import FloatArray, IntArray, Number, Score
from visft_ds.evals.judge.knn import QUERIES
from visft_ds.evals.judge.protocol import CLASSIFIED_SIZES, NORMALISED
from visft_ds.evals.judge.ranking import hits, rank_of
from visft_ds.evals.judge.rows import Rows

SHOTS = (1, 2, 4, 8, 16)  #: images of a class
DRAWS = 10


def _number(shots: int) -> Number:
    images = "1 image" if shots == 1 else f"{shots} images"
    return Number(
        f"{shots}-shot",
        how=f"The nearest of the means of {images} of each class, mean of {DRAWS} draws of these; class "
        "tokens, centred and divided by their length.",
        published="The middle 224 pixels of images of 256.",
        quick=CLASSIFIED_SIZES,
        source="https://arxiv.org/abs/1911.04623, CL2N",
        differs=f"{NORMALISED}; the centre is the mean of the drawn images (there of images of other "
        "classes); equal distances count as wrong",
        side=224,
    )


NUMBERS = tuple(map(_number, SHOTS))


def units_of_classes(labels: IntArray, owners: IntArray) -> IntArray:
    """(classes,), number of images of each class, or of groups of these.

    Args:
        labels: (images,) classes.
        owners: (images,) numbers of the images, or of their groups.
    """
    pairs = np.unique(np.stack([labels, owners]), axis=1)
    return np.bincount(pairs[0])


def few_shots(name: str, train: Rows, test: Rows, draws: int = DRAWS) -> Score:
    """Share of rows whose class has the nearest mean, by a number's name."""
    shots = int(name.removesuffix("-shot"))
    labels = train.labels.cpu().numpy()
    owners = train.owners.cpu().numpy()
    correct = []
    for taught in _drawn(labels, owners, shots, draws):
        features = train.features[taught.to(train.features.device)].float()
        centre = features.mean(dim=(0, 1))
        means = F.normalize(features - centre, dim=2).mean(dim=1)
        correct.append(_correct(means, centre, test))
    of_draws = np.stack(correct)

    # Draws of an image share it: in K of n images any two draws have K / n in common, by which the error of
    # their mean exceeds that of independent ones. Scaled to it, a draw stands for the mean of all.
    shared = float((shots / units_of_classes(labels, owners)).mean())
    error = math.sqrt(1 / draws + shared / (1 - shared))
    levels = of_draws.mean(axis=1)
    around_mean = levels.mean() + (levels - levels.mean()) * error
    return Score(name, of_draws.mean(axis=0), test.owners.cpu().numpy(), retrained=around_mean)


def _drawn(labels: IntArray, owners: IntArray, shots: int, draws: int) -> Iterator[Tensor]:
    """(classes, shots) numbers of images for each draw; of one class all are of different owners."""
    images_of_class = [np.flatnonzero(labels == label) for label in range(int(labels.max()) + 1)]
    for draw in range(draws):
        rng = np.random.default_rng([2, draw])
        taught = []
        for images in images_of_class:
            shuffled = rng.permutation(images)
            first_of_owner = np.unique(owners[shuffled], return_index=True)[1]
            taught.append(shuffled[np.sort(first_of_owner)[:shots]])
        yield torch.from_numpy(np.stack(taught))


def _correct(means: Tensor, centre: Tensor, test: Rows) -> FloatArray:
    """(n,), 1.0 for each row to whose direction from the centre the mean (classes, D) of its class is
    nearest."""
    correct = []
    for batch in test.batches(QUERIES):
        directions = F.normalize(batch.features.float() - centre, dim=1)
        nearness = 2 * directions @ means.T - means.square().sum(dim=1)
        correct.append(hits(rank_of(nearness, batch.labels).cpu(), 1))
    return np.concatenate(correct)
