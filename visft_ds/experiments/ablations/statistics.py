"""Confidence interval of a difference over a few seeds.

Every seed gives one difference, both sides of which share all that seed decided. Their mean has Student's t interval:
it assumes that differences are about normal, and with three seeds it is wide (4.3 standard errors either way), as it
should be. Resampling three numbers would pretend to know more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

LEVEL = 0.95
#: Differences below which there is no interval.
FEWEST = 2
_NO_WIDTH = 1e-9


@dataclass(frozen=True)
class Estimate:
    """The mean of some numbers, and where the mean of all seeds would lie."""

    values: tuple[float, ...]  #: one of each seed
    mean: float
    low: float | None  #: None: too few seeds for an interval
    high: float | None

    @property
    def sure(self) -> bool:
        """Return True if there is an interval with a width, and it excludes zero.

        Shares of a few hundred items change in steps: seeds that happen to agree on one predict nothing about others.
        """
        if self.low is None or self.high is None or self.high - self.low < _NO_WIDTH:
            return False
        return self.low > 0 or self.high < 0


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and t interval (LEVEL) of at least one finite number."""
    assert values and all(map(math.isfinite, values)), values
    count = len(values)
    mean = math.fsum(values) / count
    if count < FEWEST:
        return Estimate(tuple(values), mean, None, None)
    margin = float(stats.t.ppf((1 + LEVEL) / 2, count - 1) * stats.sem(values))
    return Estimate(tuple(values), mean, mean - margin, mean + margin)
