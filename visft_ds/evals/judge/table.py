"""The one table of a comparison: each number of each arm, and its difference from the first arm.

An arm is a model, or several of one recipe with different seeds. Differences are taken item by item before they are
resampled: two models that fail on the same images differ surely by little, even if each of their numbers alone is
unsure.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from visft_ds.evals.judge.intervals import (
    LEVEL,
    holm,
    interval,
    over_both,
    over_seeds,
    resampled,
    two_sided,
    with_few,
)
from visft_ds.evals.judge.protocol import FloatArray, Score
from visft_ds.evals.records import Interval
from visft_ds.monitor.console import Section

Results = Mapping[str, Mapping[str, Score]]  #: model -> name -> score


@dataclass(frozen=True)
class Seeds:
    """Parts of a difference over several seeds."""

    each: tuple[float, ...]  #: the difference of each
    items: Interval  #: of these seeds on other items
    seeds: Interval  #: of other seeds on these items


@dataclass(frozen=True)
class Row:
    """Row of a table: one number of all arms."""

    name: str
    items: int
    values: Mapping[str, Interval]  #: arm -> its number; without arms that have none
    differences: Mapping[str, Interval]  #: arm -> its number minus that of the first arm, over items and seeds
    p: Mapping[str, float]  #: arm -> p value of its difference, two-sided
    seeds: Mapping[str, Seeds]  #: arm of several seeds -> what its interval is made of
    shown: Mapping[str, bool] = field(default_factory=dict)  #: arm -> decision about its difference, see `decide`


def rows_of(results: Results, arms: Mapping[str, Sequence[str]] | None = None, primary: str | None = None) -> list[Row]:
    """A row for each number, in the order in which they came.

    Args:
        results: the first arm is what the others are compared with, seed by seed if both have several.
        arms: name -> its models; None: each model is one.
        primary: see `decide`.
    """
    arms = {label: [label] for label in results} if arms is None else arms
    names = dict.fromkeys(name for scores in results.values() for name in scores)
    rows = [_row(name, results, arms) for name in names]
    return rows if primary is None else decide(rows, primary)


def decide(rows: Sequence[Row], primary: str) -> list[Row]:
    """Say of each arm which of its differences are shown: the primary one by its own interval, the others by Holm."""
    shown: dict[str, dict[str, bool]] = {}
    for label in dict.fromkeys(label for row in rows for label in row.p):
        others = holm({row.name: row.p[label] for row in rows if label in row.p and row.name != primary})
        for row in rows:
            if label in row.p:
                sure = row.differences[label].sure if row.name == primary else others[row.name]
                shown.setdefault(row.name, {})[label] = sure
    return [replace(row, shown=shown.get(row.name, {})) for row in rows]


def _row(name: str, results: Results, arms: Mapping[str, Sequence[str]]) -> Row:
    having = {
        arm: [results[label][name] for label in labels]
        for arm, labels in arms.items()
        if all(name in results[label] for label in labels)
    }
    base = next(iter(arms))
    values = {arm: _interval(name, *_resampled(name, seeds, None)) for arm, seeds in having.items()}
    differences, p, of_seeds = {}, {}, {}
    for arm, seeds in having.items() if base in having else ():
        if arm == base:
            continue
        each, means = _resampled(name, seeds, having[base])
        found = _interval(name, each, means), two_sided(over_both(each, means, _rng(name, "seeds")))
        differences[arm], p[arm] = with_few(*found, _units(seeds[0]))
        if len(each) > 1:
            items = interval(float(each.mean()), means.mean(axis=0))
            of_seeds[arm] = Seeds(tuple(each.tolist()), items, over_seeds(each))
    count = len(next(iter(having.values()))[0].values) if having else 0
    return Row(name, count, values, differences, p, of_seeds)


def _units(score: Score) -> int:
    """Number of independent items."""
    return len(score.values if score.groups is None else np.unique(score.groups))


def _rng(name: str, part: str = "") -> np.random.Generator:
    """The same numbers every time the table is made."""
    return np.random.default_rng(zlib.crc32(f"{name}{part}".encode()))


def _interval(name: str, values: FloatArray, means: FloatArray) -> Interval:
    return interval(float(values.mean()), over_both(values, means, _rng(name, "seeds")))


def _resampled(name: str, new: Sequence[Score], old: Sequence[Score] | None) -> tuple[FloatArray, FloatArray]:
    """(numbers (seeds,), the same resampled (seeds, DRAWS)) of each seed, minus those of the old ones if given.

    All seeds of both are resampled by the same draws.
    """
    count = max(len(new), len(old or ()))
    new, olds = (list(part) * count if len(part) == 1 else list(part) for part in (new, old or ()))
    assert all(score.values.shape == new[0].values.shape for score in (*new, *olds)), name
    each, groups = [score.values for score in new], new[0].groups
    if each[0].ndim == 1:  # item by item
        each = [score.values - past.values for score, past in zip(new, olds, strict=True)] if olds else each
        return np.array([float(one.mean()) for one in each]), resampled(each, groups, _rng(name))
    drawn = resampled([*each, *(score.values for score in olds)], groups, _rng(name))
    values = np.array([score.value for score in new])
    if olds:
        values = np.array([score.value - past.value for score, past in zip(new, olds, strict=True)])
        drawn = drawn[:count] - drawn[count:]
    return values, drawn


def section(rows: Sequence[Row], labels: Sequence[str], primary: str | None = None) -> Section:
    """The table for a console, in percent: a row for each number and arm; a difference with its interval, marked * if
    it excludes zero; with a primary number, if it is significant.
    """
    base, *others = labels
    lines = []
    for row in rows:
        percent = {label: f"{100 * value.value:.2f}" for label, value in row.values.items()}
        for label in others or ("",):
            change = row.differences.get(label)
            text = "" if change is None else change.text(shown=row.shown.get(label, change.sure))
            lines.append([row.name, str(row.items), percent.get(base, ""), label, percent.get(label, ""), text])
    marked = "" if primary is None else f"; * is significant: {primary} by its own interval, the others by Holm"
    columns = ["", "n", base, "", "", "difference"]
    return Section(f"percent; of differences the {LEVEL:.0%} interval{marked}", lines, columns)


def verdict(row: Row, label: str) -> str:
    """A decided difference in words: "not significant: +0.40 [-1.90, +2.70]"."""
    return f"{'' if row.shown[label] else 'not '}significant: {row.differences[label].text()}"
