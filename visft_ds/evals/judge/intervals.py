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
        several: arrays of one shape: (n,), n at least 1; or (n, 2, C), see `benchmark.Score`.
        groups: (n,) numbers; whole groups are drawn, since their items are no independent evidence.
    """
    is_mean = several[0].ndim == 1
    ratios = several
    if is_mean:  # values and ones (n, 2, 1): a mean is the ratio of their sums
        ratios = [np.stack([values, np.ones_like(values)], axis=1)[..., None] for values in several]
    per_item = np.stack(ratios, axis=1)  # (n, arrays, 2, C)
    shape = per_item.shape[1:]
    sums = per_item.reshape(len(per_item), -1)
    if groups is not None:
        present, group_of_row = np.unique(groups, return_inverse=True)
        rows = sums
        sums = np.zeros((len(present), rows.shape[1]))
        np.add.at(sums, group_of_row, rows)
    units = len(sums)
    shares = np.full(units, 1 / units)
    if is_mean:  # equal values are many; equal counts of pixels are not
        sums, counts = np.unique(sums, axis=0, return_counts=True)
        shares = counts / units

    means = []
    step = max(1, _CELLS // max(sums.shape))
    for start in range(0, DRAWS, step):
        draws = min(step, DRAWS - start)
        often = rng.multinomial(units, shares, size=draws).astype(np.float64)
        means.append(mean_ratio((often @ sums).reshape(draws, *shape)))
    return np.concatenate(means).T


def interval(value: float, means: FloatArray) -> Interval:
    """The interval of a value whose resampled versions are given."""
    low = np.quantile(means, (1 - LEVEL) / 2)
    high = np.quantile(means, (1 + LEVEL) / 2)
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
        students = rng.standard_t(len(retrained) - 1, len(draws))
        draws = draws + retrained.std(ddof=1) * students
    seeds = len(values)
    if seeds == 1:
        return draws
    draws = np.tile(draws, _TIMES)  # the tails of t are long: each draw meets several of its values
    levels = (np.arange(len(draws)) + 0.5) / len(draws)
    students = rng.permutation(stdtrit(seeds - 1, levels))
    error = float(values.std(ddof=1)) / math.sqrt(seeds)
    spread: FloatArray = draws + error * students
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
        edge = stdtrit(self.freedom, (1 + LEVEL) / 2)
        return float(self.error * (edge + stdtrit(self.freedom, POWER)))


def spread_of(values: FloatArray, means: FloatArray, retrained: FloatArray | None, units: int) -> Spread:
    """Spread of the mean over seeds; the independent parts are joined as Welch and Satterthwaite do.

    Args:
        values, means, retrained: as for `combined`.
        units: items, or groups of items.
    """
    parts = [(float(means.mean(axis=0).var()), units - 1)]
    if retrained is not None:
        parts.append((float(retrained.var(ddof=1)), len(retrained) - 1))
    seeds = len(values)
    if seeds > 1:
        parts.append((float(values.var(ddof=1)) / seeds, seeds - 1))
    total = sum(variance for variance, _ in parts)
    weights = sum(variance**2 / max(1, freedom) for variance, freedom in parts)
    return Spread(math.sqrt(total), total**2 / weights if weights else math.inf)


def holm(p_values: Mapping[_Key, float]) -> set[_Key]:
    """Keys of what is shown, so that a false one is among them at most once in 1 / (1 - LEVEL) times.

    Holm, https://www.jstor.org/stable/4615733.
    """
    shown: set[_Key] = set()
    for key in sorted(p_values, key=lambda key: p_values[key]):
        if p_values[key] > (1 - LEVEL) / (len(p_values) - len(shown)):
            break
        shown.add(key)
    return shown
