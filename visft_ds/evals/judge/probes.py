"""Classification by frozen features: nearest neighbours and logistic regression.

Nearest neighbours vote as in DINO (https://arxiv.org/abs/2104.14294, 4.1): the 20 nearest by cosine, each with
exp(similarity / 0.07). Logistic regression reads the class token beside the mean of the patches, as DINOv2's linear
classifier does (one of the two where a model has no other), centred and divided by one number for all channels; its
strength of regularisation is the best of STRENGTHS on a fifth of the training images, which it then learns as well.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from visft_ds.evals.judge import heads
from visft_ds.evals.judge.classes import ClassSet
from visft_ds.evals.judge.in_context import RESAMPLES, ROWS, Memory, vote
from visft_ds.evals.judge.protocol import Benchmark, Features, IntArray, Score, hits, rank_of, resamples
from visft_ds.monitor.console import gauge

NEIGHBOURS, TEMPERATURE = 20, 0.07
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)  #: scikit-learn's C
_FEW = 1.0  # the strength where no class has images to spare
_STEPS = 5000
_SMALL = 2**23  # numbers

Array = npt.NDArray[np.float32]


def classification(label: str, train: ClassSet, test: ClassSet) -> Benchmark:
    """kNN and linear accuracy."""

    def scores(features: Features, wanted: Collection[str] = ("kNN", "linear")) -> Iterator[Score]:
        learnt, judged = features["train"], features["test"]
        for name in (name for name in ("kNN", "linear") if name in wanted):
            yield _accuracy(name, learnt, train.labels, judged, test.labels)

    def held_out(features: Mapping[str, Tensor], number: str) -> float:
        held = _held(train.labels)
        if not held.any():
            raise ValueError(f"{label} has no class of five training images; a fifth of them chooses a layer")
        rest, fifth = ({kind: of[torch.from_numpy(part)] for kind, of in features.items()} for part in (~held, held))
        return _accuracy(number, rest, train.labels[~held], fifth, train.labels[held], resampled=False).value

    labels = [train.labels.tolist(), test.labels.tolist()]
    return Benchmark(
        label,
        {"train": train.images, "test": test.images},
        ("pooled", "mean"),
        ("kNN", "linear"),
        {"benchmark": "classification 1", "protocol": STRENGTHS, "labels": labels, "names": list(test.classes)},
        scores,
        held_out=held_out,
    )


def _accuracy(
    name: str,
    learnt: Mapping[str, Tensor],
    labels: IntArray,
    judged: Mapping[str, Tensor],
    truth: IntArray,
    resampled: bool = True,
) -> Score:
    if name == "kNN":
        return by_neighbours(name, learnt["pooled"], labels, judged["pooled"], truth, draws=RESAMPLES * resampled)
    both = (
        torch.cat([of[kind] for kind in ("pooled", "mean") if kind in of], dim=1).numpy() for of in (learnt, judged)
    )
    return by_regression(name, next(both), labels, next(both), truth, draws=heads.RESAMPLES * resampled)


def by_neighbours(
    name: str,
    train: Tensor,
    labels: IntArray,
    test: Tensor,
    truth: IntArray,
    owners: IntArray | None = None,
    draws: int = RESAMPLES,
) -> Score:
    """1.0 for each row of (n, D) whose neighbours among (m, D) vote for its class alone.

    Args:
        owners: (m,), numbers of the training images that rows are of; None: each is one.
    """
    rows = np.arange(len(labels)) if owners is None else owners
    memory = Memory(F.normalize(train, dim=1), torch.from_numpy(labels), torch.from_numpy(rows))
    right = []
    for part, there in zip(test.split(ROWS), torch.from_numpy(truth).split(ROWS), strict=True):
        votes = vote(memory, part, NEIGHBOURS, TEMPERATURE, draws)
        votes = F.pad(votes, (0, max(0, int(truth.max()) + 1 - votes.shape[2])))  # classes that were not taught
        right.append(np.stack([hits(rank_of(one, there), 1) for one in votes]))
    found = np.concatenate(right, axis=1)
    return Score(name, found[0], retrained=found[1:].mean(axis=1))


def by_regression(
    name: str,
    train: Array,
    labels: IntArray,
    test: Array,
    truth: IntArray,
    owners: IntArray | None = None,
    draws: int = heads.RESAMPLES,
) -> Score:
    """1.0 for each row of (n, D) whose class logistic regression predicts; arguments as above."""
    rows = np.arange(len(labels)) if owners is None else owners
    held, strength = _held(labels), _FEW
    if held.any():
        accuracy = []
        for candidate in gauge("linear probe", len(STRENGTHS), "strengths", STRENGTHS):
            predicted = _predicted(train[~held], labels[~held], train[held], candidate)
            accuracy.append(float((predicted == labels[held]).mean()))
        strength = STRENGTHS[int(np.argmax(accuracy))]
    copies = [np.ones(int(rows.max()) + 1, dtype=np.int64), *resamples(int(rows.max()) + 1, draws)]
    drawn = [np.repeat(np.arange(len(rows)), often[rows]) for often in copies]
    right = np.stack([_predicted(train[of], labels[of], test, strength) for of in drawn]) == truth
    return Score(name, right[0].astype(np.float64), retrained=right[1:].mean(axis=1))


def _held(labels: IntArray) -> npt.NDArray[np.bool_]:
    """Every fifth image of a class; of a class of fewer than five none."""
    held = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        held[np.flatnonzero(labels == label)[4::5]] = True
    return held


def _predicted(train: Array, labels: IntArray, test: Array, strength: float) -> IntArray:
    if len(np.unique(labels)) < 2:
        return np.full(len(test), labels[0], dtype=np.int64)
    middle = train.mean(axis=0, dtype=np.float64)
    spread = math.sqrt(float(((train - middle) ** 2).mean())) or 1.0
    model = _regression((train - middle) / spread, labels, strength)
    predicted: IntArray = model.predict((test - middle) / spread).astype(np.int64)
    return predicted


def _regression(features: Array, labels: IntArray, strength: float) -> Any:
    """scikit-learn's logistic regression; threads would spend more time on waiting than on products of small arrays."""
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1 if features.size < _SMALL else None, "blas"):
        return LogisticRegression(C=strength, max_iter=_STEPS).fit(features, labels)
