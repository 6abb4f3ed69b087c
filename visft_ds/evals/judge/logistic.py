"""Logistic regression on frozen features, on the device that they lie on.

Features are centred and divided by one number for all channels. The strength of regularisation is the best of
STRENGTHS on a fifth of the training images, which the classifier then learns as well.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from visft_ds.evals.judge.benchmark import FloatArray, Score
from visft_ds.evals.judge.rows import Rows, accuracy, held_out
from visft_ds.monitor.console import gauge

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)  #: scikit-learn's C
RESAMPLES = 5  #: of the training images
_PLAIN_STRENGTH = 1.0  # where no class has images to spare
_MAX_ITERATIONS = 1000  # of L-BFGS
_TOLERANCE = 1e-4  # largest entry of the gradient, as scikit-learn's
_HISTORY = 20  # steps that L-BFGS remembers


def logistic_regression(name: str, train: Rows, test: Rows, draws: int = RESAMPLES) -> Score:
    """Share of rows whose class logistic regression predicts."""
    strength = _best_strength(train)
    classifier = _Classifier(train)
    copies_of_rows = train.copies(draws)[:, train.owners].float()
    correct = []
    for weights in copies_of_rows:
        classifier.fit(strength, weights)
        correct.append(classifier.correct(test))
    return accuracy(name, np.stack(correct), test)


def _best_strength(train: Rows) -> float:
    """The strength that is best on a fifth of the training images, by a classifier of the others."""
    is_held_out = held_out(train.labels, train.owners)
    if not is_held_out.any():
        return _PLAIN_STRENGTH
    taught = train.subset(~is_held_out)
    judged = train.subset(is_held_out)
    classifier = _Classifier(taught)
    even = torch.ones(len(taught.labels), device=taught.labels.device)
    levels = []
    for strength in gauge("linear probe", len(STRENGTHS), "strengths", STRENGTHS):
        classifier.fit(strength, even)
        levels.append(classifier.correct(judged).mean())
    return STRENGTHS[int(np.argmax(levels))]


class _Classifier:
    """Multinomial logistic regression. Each fit begins at the solution of the last one."""

    def __init__(self, train: Rows) -> None:
        features = train.features.float()
        self._mean = features.mean(dim=0)
        self._scale = (features - self._mean).square().mean().sqrt().clamp(min=1e-12)
        self._features = (features - self._mean) / self._scale
        self._labels = train.labels.long()
        classes = int(self._labels.max()) + 1
        # The last column is the intercept.
        self._coefficients = features.new_zeros(classes, features.shape[1] + 1)
        self._is_taught = self._labels.bincount() > 0

    def fit(self, strength: float, weights: Tensor) -> None:
        """Minimise sum of weights * cross entropy + |coefficients|^2 / (2 * strength)."""
        coefficients = self._coefficients.clone().requires_grad_()
        optimizer = torch.optim.LBFGS(
            [coefficients],
            max_iter=_MAX_ITERATIONS,
            tolerance_grad=_TOLERANCE,
            tolerance_change=1e-9,
            history_size=_HISTORY,
            line_search_fn="strong_wolfe",
        )
        total_weight = weights.sum()
        shares = weights / total_weight
        penalty = 1 / (2 * strength * float(total_weight))

        def closure() -> Tensor:
            optimizer.zero_grad()
            logits = _logits(self._features, coefficients)
            losses = F.cross_entropy(logits, self._labels, reduction="none")
            loss = (shares * losses).sum() + penalty * coefficients[:, :-1].square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        self._coefficients = coefficients.detach()

    def correct(self, test: Rows) -> FloatArray:
        """(n,), 1.0 for each row whose class is predicted."""
        logits = _logits((test.features.float() - self._mean) / self._scale, self._coefficients)
        logits[:, ~self._is_taught] = -math.inf
        correct: FloatArray = (logits.argmax(dim=1) == test.labels).double().cpu().numpy()
        return correct


def _logits(features: Tensor, coefficients: Tensor) -> Tensor:
    return F.linear(features, coefficients[:, :-1], coefficients[:, -1])
