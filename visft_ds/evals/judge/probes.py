"""Probes of frozen features: nearest neighbours, logistic regression, and that from few images.

Nearest neighbours vote as in DINO (https://arxiv.org/abs/2104.14294, 4.1): the 20 nearest by cosine, each with
exp(similarity / 0.07). Logistic regression reads features that are centred and divided by one number for all channels;
its strength of regularisation is the best of STRENGTHS on a fifth of the training images, which it then learns as well.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from visft_ds.evals.judge.classes import ClassSet
from visft_ds.evals.judge.protocol import Benchmark, Features, FloatArray, IntArray, Score, hits, rank_of
from visft_ds.monitor.console import gauge

NEIGHBOURS, TEMPERATURE = 20, 0.07
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)  #: scikit-learn's C
SHOTS = (1, 2, 4, 8, 16)  #: training images of a class
DRAWS = 3  #: of these images; a test image counts with the share of draws in which it was right
#: Few images cannot spare a fifth, so their C is fixed: 1 with features of unit variance.
FEW_SHOT_STRENGTH = 1.0
_ROWS, _STEPS = 1024, 5000
_SMALL = 2**23  # numbers

Array = npt.NDArray[np.float32]


def probe(label: str, train: ClassSet, test: ClassSet) -> Benchmark:
    """kNN, linear probe and k-shot accuracy on `pooled` features."""
    fewest = int(np.bincount(train.labels, minlength=len(train.classes)).min())
    shots = [count for count in SHOTS if count <= fewest]

    def scores(features: Features, wanted: Collection[str]) -> Iterator[Score]:
        learnt, judged = (features[name]["pooled"] for name in ("train", "test"))
        yield Score("knn", nearest_neighbours(learnt, train.labels, judged, test.labels, len(test.classes)))
        given = learnt.numpy(), train.labels, judged.numpy(), test.labels
        yield Score("linear", linear_probe(*given))
        for count in shots:
            yield Score(f"{count}-shot", np.mean([_few(*given, count, draw) for draw in range(DRAWS)], axis=0))

    protocol = [NEIGHBOURS, TEMPERATURE, STRENGTHS, SHOTS, DRAWS, FEW_SHOT_STRENGTH]
    labels = [train.labels.tolist(), test.labels.tolist()]
    return Benchmark(
        label,
        {"train": train.images, "test": test.images},
        ("pooled",),
        ("knn", "linear", *(f"{count}-shot" for count in shots)),
        {"benchmark": "probe 1", "protocol": protocol, "labels": labels, "names": list(test.classes)},
        scores,
    )


def nearest_neighbours(train: Tensor, labels: IntArray, test: Tensor, truth: IntArray, classes: int) -> FloatArray:
    """1.0 for each test image (n, D) whose neighbours among (m, D) vote for its class alone."""
    return hits(rank_of(vote(train, labels, test, classes), torch.from_numpy(truth)), 1)


def vote(train: Tensor, labels: IntArray, test: Tensor, classes: int) -> Tensor:
    """(n, classes) float64, what the neighbours of (n, D) among (m, D) with labels (m,) vote for."""
    train, test = (torch.nn.functional.normalize(part, dim=1) for part in (train, test))
    labels_of_train = torch.from_numpy(labels)
    votes = torch.zeros(len(test), classes, dtype=torch.float64)
    for start in range(0, len(test), _ROWS):
        similarity, places = (test[start : start + _ROWS] @ train.T).topk(min(NEIGHBOURS, len(train)), dim=1)
        weights = (similarity.double() / TEMPERATURE).exp()
        votes[start : start + _ROWS].scatter_add_(1, labels_of_train[places], weights)
    return votes


def linear_probe(train: Array, labels: IntArray, test: Array, truth: IntArray) -> FloatArray:
    """1.0 for each test image whose class is predicted."""
    held = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        held[np.flatnonzero(labels == label)[4::5]] = True  # a class of fewer than five is not held out
    strength = FEW_SHOT_STRENGTH
    if held.any():
        accuracy = []
        for candidate in gauge("linear probe", len(STRENGTHS), "strengths", STRENGTHS):
            predicted = _predicted(train[~held], labels[~held], train[held], candidate)
            accuracy.append(float((predicted == labels[held]).mean()))
        strength = STRENGTHS[int(np.argmax(accuracy))]
    return (_predicted(train, labels, test, strength) == truth).astype(np.float64)


def _few(train: Array, labels: IntArray, test: Array, truth: IntArray, shots: int, draw: int) -> FloatArray:
    """The same images for every model: they depend on the number of the draw alone."""
    rng = np.random.default_rng([shots, draw])
    places = [rng.choice(np.flatnonzero(labels == label), shots, replace=False) for label in np.unique(labels)]
    places_of_all = np.concatenate(places)
    return (_predicted(train[places_of_all], labels[places_of_all], test, FEW_SHOT_STRENGTH) == truth).astype(
        np.float64
    )


def _predicted(train: Array, labels: IntArray, test: Array, strength: float) -> IntArray:
    if len(np.unique(labels)) < 2:
        return np.full(len(test), labels[0], dtype=np.int64)
    middle = train.mean(axis=0, dtype=np.float64)
    spread = math.sqrt(float(((train - middle) ** 2).mean())) or 1.0
    model = fitted((train - middle) / spread, labels, strength, _STEPS)
    predicted: IntArray = model.predict((test - middle) / spread).astype(np.int64)
    return predicted


def fitted(features: Array, labels: IntArray, strength: float, steps: int) -> Any:
    """scikit-learn's logistic regression; threads would spend more time on waiting than on products of small arrays."""
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1 if features.size < _SMALL else None, "blas"):
        return LogisticRegression(C=strength, max_iter=steps).fit(features, labels)
