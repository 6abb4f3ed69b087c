"""Intervals of numbers: over test items, training images and seeds; and which of many differences is shown.

Items are resampled: bootstrap intervals of a mean (Efron, https://doi.org/10.1214/aos/1176344552). Drawing n
items with replacement decides only how often each value comes; so the counts of the distinct values are drawn
(multinomial), which is the same distribution and costs the same for ten items and for a million.
(scipy.stats.bootstrap draws item by item, forty times as long for 50,000 shares, and knows no groups of
items.)

A probe also depends on the images it learnt from. R probes retrained on resamples of them say by how much:
the standard deviation of their difference, times a value of Student's t with R - 1 degrees of freedom, is
added to each draw. Resampling test items alone finds a difference between equal models in 9 % of cases
instead of 5 (docs/evidence.md), and a normal value for five probes in 12 % where the training images decide.

Seeds are few, so they follow Student's t: s / sqrt(k) times a value of Student's t with k - 1 degrees of
freedom is added, s being the spread of the k seeds. Where seeds decide, drawing three of them with
replacement covers 80 % instead of 95 (docs/evidence.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from scipy.special import stdtr, stdtrit

from visft_ds.evals.judge.benchmark import FloatArray, IntArray, mean_ratio
from visft_ds.evals.records import Interval

DRAWS = 4000
LEVEL = 0.95
POWER = 0.8  #: share of repetitions in which a detectable difference is seen
_CELLS = 4_000_000  # counts in memory at once
_TIMES = 10
_Key = TypeVar("_Key")


def resampled(several: Sequence[FloatArray], groups: IntArray | None, rng: np.random.Generator) -> FloatArray:
    """(arrays, DRAWS), means of resampled values, of all arrays by the same draws.

    Args:
        several: arrays of one shape: (n,), n at least 1; or (n, 2, C), see `protocol.Score`.
        groups: (n,) numbers; whole groups are drawn, since their items are no independent evidence.
    """
    is_mean = several[0].ndim == 1
    ratios = [np.stack([one, np.ones_like(one)], axis=1)[..., None] if is_mean else one for one in several]
    rows = np.stack(ratios, axis=1)
    sums = rows.reshape(len(rows), -1)
    if groups is not None:
        present, units = np.unique(groups, return_inverse=True)
        sums = np.zeros((len(present), sums.shape[1]))
        np.add.at(sums, units, rows.reshape(len(rows), -1))
    kinds, often = np.unique(sums, axis=0, return_counts=True) if is_mean else (sums, np.ones(len(sums)))
    means = []
    step = max(1, _CELLS // max(kinds.shape))
    for start in range(0, DRAWS, step):
        drawn = rng.multinomial(len(sums), often / often.sum(), size=min(step, DRAWS - start)).astype(
            np.float64
        )
        means.append(mean_ratio((drawn @ kinds).reshape(-1, *rows.shape[1:])))
    return np.concatenate(means).T


def interval(value: float, means: FloatArray) -> Interval:
    """The interval of a value whose resampled versions are given."""
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high))


def combined(
    values: FloatArray, means: FloatArray, retrained: FloatArray | None, rng: np.random.Generator
) -> FloatArray:
    """Draws of the mean over seeds that vary as test items, training images and seeds do.

    Args:
        values: (seeds,), the numbers themselves.
        means: (seeds, DRAWS), the same of resampled items.
        retrained: (R,), their mean over the seeds by probes that learnt from R resamples; None where nothing
        learns.
    """
    draws: FloatArray = means.mean(axis=0)
    if retrained is not None:
        draws = draws + retrained.std(ddof=1) * rng.standard_t(len(retrained) - 1, len(draws))
    if len(values) == 1:
        return draws
    draws = np.tile(draws, _TIMES)  # the tails of t are long: each draw meets several of its values
    quantiles = stdtrit(len(values) - 1, (np.arange(len(draws)) + 0.5) / len(draws))
    error = float(values.std(ddof=1)) / math.sqrt(len(values))
    spread: FloatArray = draws + error * rng.permutation(quantiles)
    return spread


@dataclass(frozen=True)
class Spread:
    """Standard error of a number, and the degrees of freedom by which it is known."""

    error: float
    freedom: float

    def two_sided(self, value: float) -> float:
        """p value of zero for a number, by the tail of Student's t: draws alone cannot tell small ones
        apart.
        """
        if not self.error:
            return float(value == 0)
        return float(2 * stdtr(self.freedom, -abs(value) / self.error))

    @property
    def detectable(self) -> float:
        """The least true number whose interval lacks zero in four of five repetitions."""
        return float(self.error * (stdtrit(self.freedom, (1 + LEVEL) / 2) + stdtrit(self.freedom, POWER)))


def spread_of(values: FloatArray, means: FloatArray, retrained: FloatArray | None, units: int) -> Spread:
    """Spread of the mean over seeds; the independent parts are joined as Welch and Satterthwaite do.

    Args:
        values, means, retrained: as for `combined`.
        units: items, or groups of items.
    """
    parts = [(float(means.mean(axis=0).var()), units - 1)]
    if retrained is not None:
        parts.append((float(retrained.var(ddof=1)), len(retrained) - 1))
    if len(values) > 1:
        parts.append((float(values.var(ddof=1)) / len(values), len(values) - 1))
    total = sum(variance for variance, _ in parts)
    weights = sum(variance**2 / max(1, freedom) for variance, freedom in parts)
    return Spread(math.sqrt(total), total**2 / weights if weights else math.inf)


def holm(p_values: Mapping[_Key, float]) -> dict[_Key, bool]:
    """Key -> whether it is shown, so that a false one is among all shown at most once in 1 / (1 - LEVEL)
    times.

    Holm, https://www.jstor.org/stable/4615733.
    """
    shown, going = {}, True
    for rank, key in enumerate(sorted(p_values, key=lambda key: p_values[key])):
        going = going and p_values[key] <= (1 - LEVEL) / (len(p_values) - rank)
        shown[key] = going
    return shown
