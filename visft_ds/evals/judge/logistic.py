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

from visft_ds.evals.judge.benchmark import FloatArray, Score, resamples
from visft_ds.evals.judge.neighbours import Rows
from visft_ds.monitor.console import gauge

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)  #: scikit-learn's C
RESAMPLES = 5  #: of the training images
_FEW = 1.0  # the strength where no class has images to spare
_STEPS = 1000  # of L-BFGS, at most
_TOLERANCE = 1e-4  # largest entry of the gradient, as scikit-learn's
_HISTORY = 20  # steps that L-BFGS remembers


class _Problem:
    """Training rows, centred and scaled, with the last solution: the next strength or resample begins
    there.
    """

    def __init__(self, train: Rows) -> None:
        features = train.features.float()
        self._middle = features.mean(dim=0)
        self._spread = (features - self._middle).square().mean().sqrt().clamp(min=1e-12)
        self._features = (features - self._middle) / self._spread
        self._labels = train.labels.long()
        classes = int(self._labels.max()) + 1
        self._solution = features.new_zeros(
            classes, features.shape[1] + 1
        )  # the last column is the intercept
        self._taught = torch.zeros(classes, dtype=torch.bool, device=features.device)
        self._taught[self._labels] = True

    def solve(self, strength: float, weights: Tensor) -> None:
        """Minimise sum of weights * cross entropy + |coefficients|^2 / (2 * strength)."""
        solution = self._solution.clone().requires_grad_()
        optimizer = torch.optim.LBFGS(
            [solution],
            max_iter=_STEPS,
            tolerance_grad=_TOLERANCE,
            tolerance_change=1e-9,
            history_size=_HISTORY,
            line_search_fn="strong_wolfe",
        )
        shares = weights / weights.sum()
        penalty = 1 / (2 * strength * float(weights.sum()))

        def loss() -> Tensor:
            optimizer.zero_grad()
            losses = F.cross_entropy(self._logits(self._features, solution), self._labels, reduction="none")
            total = (shares * losses).sum() + penalty * solution[:, :-1].square().sum()
            total.backward()
            return total

        optimizer.step(loss)
        self._solution = solution.detach()

    def right(self, test: Rows) -> FloatArray:
        """1.0 for each row whose class is predicted."""
        logits = self._logits((test.features.float() - self._middle) / self._spread, self._solution)
        logits[:, ~self._taught] = -math.inf
        right: FloatArray = (logits.argmax(dim=1) == test.labels).double().cpu().numpy()
        return right

    @staticmethod
    def _logits(features: Tensor, solution: Tensor) -> Tensor:
        return F.linear(features, solution[:, :-1], solution[:, -1])


def by_regression(name: str, train: Rows, test: Rows, draws: int = RESAMPLES) -> Score:
    """1.0 for each row whose class logistic regression predicts."""
    held = held_out(train.labels, train.owners)
    strength = _FEW
    if held.any():
        problem, fifth = _Problem(train.part(~held)), train.part(held)
        even = torch.ones(int((~held).sum()), device=held.device)
        levels = []
        for tried in gauge("linear probe", len(STRENGTHS), "strengths", STRENGTHS):
            problem.solve(tried, even)
            levels.append(problem.right(fifth).mean())
        strength = STRENGTHS[int(np.argmax(levels))]
    problem = _Problem(train)
    copies = torch.from_numpy(resamples(int(train.owners.max()) + 1, draws)).to(train.owners.device)
    right = []
    for drawn in copies[:, train.owners].float():
        problem.solve(strength, drawn)
        right.append(problem.right(test))
    each = np.stack(right)
    return Score(name, each[0], test.owners.cpu().numpy(), retrained=each[1:].mean(axis=1))


def held_out(labels: Tensor, owners: Tensor, nth: int = 5) -> Tensor:
    """Mask of the rows that choose a setting: every nth image of a class, or where several rows have an
    owner (an image, a patient) every nth owner whole. Of fewer than `nth` every fifth, of fewer than five
    none.
    """
    held = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
    units = owners.unique()
    if len(units) < len(owners):
        return torch.isin(owners, _every(units, nth))
    for label in labels.unique():
        held[_every((labels == label).nonzero()[:, 0], nth)] = True
    return held


def _every(units: Tensor, nth: int) -> Tensor:
    """Every nth of some units; of fewer than `nth` every fifth."""
    step = nth if len(units) >= nth else 5
    return units[step - 1 :: step]
