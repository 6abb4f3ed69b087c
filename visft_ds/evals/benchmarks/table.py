"""The one table of a comparison: each number of each model, and what changed against the first model.

Differences are taken item by item before they are resampled: two models that fail on the same images differ surely by
little, even where each of their numbers alone is unsure.

Intervals are bootstrap ones of a mean (Efron, https://doi.org/10.1214/aos/1176344552). Drawing n items with replacement
decides only how often each value comes; so the counts of the distinct values are drawn (multinomial), which is the same
distribution and costs the same for ten items and for a million. (scipy.stats.bootstrap draws item by item, forty times
as long for 50,000 shares, and knows no groups of items.)
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from visft_ds.evals.benchmarks.protocol import FloatArray, IntArray, Score
from visft_ds.monitor.console import Section

DRAWS = 4000
LEVEL = 0.95
_CELLS = 4_000_000  # counts in memory at once

Results = Mapping[str, Mapping[str, Score]]  #: model -> name -> score
_Part = tuple[FloatArray, IntArray | None]


@dataclass(frozen=True)
class Interval:
    """A mean with its bootstrap interval of LEVEL, by percentiles."""

    value: float
    low: float
    high: float

    @property
    def sure(self) -> bool:
        """Return True if the interval excludes zero."""
        return self.low > 0 or self.high < 0


def resampled_means(values: FloatArray, groups: IntArray | None, rng: np.random.Generator) -> FloatArray:
    """DRAWS means of resampled values.

    Args:
        values: (n,), n at least 1.
        groups: (n,) numbers from 0; whole groups are drawn, since their items are no independent evidence.
    """
    units = np.arange(len(values)) if groups is None else groups
    sums, counts = np.bincount(units, values), np.bincount(units).astype(np.float64)
    sums, counts = sums[counts > 0], counts[counts > 0]
    kinds, often = np.unique(np.stack([sums, counts], axis=1), axis=0, return_counts=True)
    means = []
    step = max(1, _CELLS // len(kinds))
    for start in range(0, DRAWS, step):
        drawn = rng.multinomial(len(sums), often / often.sum(), size=min(step, DRAWS - start))
        means.append((drawn @ kinds[:, 0]) / (drawn @ kinds[:, 1]))
    return np.concatenate(means)


def interval(value: float, means: FloatArray) -> Interval:
    """The interval of a value whose resampled versions are given."""
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high))


@dataclass(frozen=True)
class Row:
    """Row of a table: one number of all models."""

    name: str
    items: int
    values: Mapping[str, Interval]  #: model -> its number; without models that have none
    differences: Mapping[str, Interval]  #: model -> its number minus that of the first model


def rows_of(results: Results, averages: Mapping[str, Sequence[str]]) -> list[Row]:
    """A row for each number, in the order in which they came.

    Args:
        results: the first model is what the others are compared with.
        averages: name of a further row -> names of the numbers whose mean it is, each data set counting the same.
    """
    names = list(dict.fromkeys(name for scores in results.values() for name in scores))
    return [_row(name, [name], results) for name in names] + [
        _row(name, parts, results) for name, parts in averages.items()
    ]


def _row(name: str, names: Sequence[str], results: Results) -> Row:
    base = next(iter(results))
    having = [label for label, scores in results.items() if all(part in scores for part in names)]
    parts = {label: [results[label][part] for part in names] for label in having}
    values = {label: _interval(name, [(score.values, score.groups) for score in parts[label]]) for label in having}
    differences = {}
    for label in having if base in having else ():
        if label != base:
            pairs = list(zip(parts[label], parts[base], strict=True))
            assert all(len(new.values) == len(old.values) for new, old in pairs), name
            differences[label] = _interval(name, [(new.values - old.values, old.groups) for new, old in pairs])
    return Row(name, sum(len(score.values) for score in parts[having[0]]) if having else 0, values, differences)


def _interval(name: str, parts: Sequence[_Part]) -> Interval:
    rng = np.random.default_rng(zlib.crc32(name.encode()))  # the same numbers every time the table is made
    means = [resampled_means(values, groups, rng) for values, groups in parts]
    return interval(float(np.mean([values.mean() for values, _ in parts])), np.mean(means, axis=0))


def section(rows: Sequence[Row], labels: Sequence[str]) -> Section:
    """The table for a console, in percent; a difference with its interval, marked * where that leaves zero out."""
    base, *others = labels
    columns = ["", "n", base]
    for label in others:
        columns += [label, "difference"]
    lines = []
    for row in rows:
        line = [row.name, str(row.items), _percent(row.values.get(base))]
        for label in others:
            line += [_percent(row.values.get(label)), _change(row.differences.get(label))]
        lines.append(line)
    return Section(f"percent; of differences the {LEVEL:.0%} interval", lines, columns)


def _percent(value: Interval | None) -> str:
    return "–" if value is None else f"{100 * value.value:.2f}"


def _change(value: Interval | None) -> str:
    if value is None:
        return "–"
    mark = " *" if value.sure else ""
    return f"{100 * value.value:+.2f} [{100 * value.low:+.2f}, {100 * value.high:+.2f}]{mark}"


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows in JSON's types, as fractions of one."""
    return [asdict(row) for row in rows]
