"""The table of a comparison: each number of each arm, and its differences.

An arm is a model, or several of one recipe with different seeds. The first arm is the base. Differences are taken item
by item before they are resampled: two models that fail on the same images differ surely by little, even if each of
their numbers alone is unsure.

One number, the primary, decides by its own intervals. All differences from the base of all other numbers are decided
together, by Holm's method.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from visft_ds.evals.judge.intervals import LEVEL, combined, holm, interval, resampled, two_sided
from visft_ds.evals.judge.protocol import FloatArray, Score
from visft_ds.evals.records import Interval, number_text
from visft_ds.monitor.console import Section

Results = Mapping[str, Mapping[str, Score]]  #: model -> name -> score


@dataclass(frozen=True)
class Trial:
    """A tuned arm, and the arms that it is judged by beside the base."""

    arm: str
    controls: tuple[str, ...] = ()  #: at its shift: noise, and what `--control` named
    half: str | None = None  #: the arm of half its change
    shift: float | None = None  #: how far it moved the base's features; None if it is of another architecture


@dataclass(frozen=True)
class Difference(Interval):
    """Difference of two arms, over test items, training images and seeds."""

    p: float  #: of zero, two-sided
    better: bool  #: the whole interval is
    worse: bool
    shown: bool  #: by its own interval, or by Holm
    alone: Interval  #: over test items alone
    #: The least true difference that would be shown in four of five repetitions: 2.8 standard errors.
    detectable: float
    each: tuple[float, ...]  #: of each seed


@dataclass(frozen=True)
class Row:
    """Row of a table: one number of all arms."""

    name: str
    items: int
    lower: bool  #: is better, as of an error
    values: Mapping[str, float]  #: arm -> its number; without arms that have none
    differences: Mapping[str, Difference]  #: arm -> its number minus the base's
    controls: Mapping[str, Mapping[str, Difference]]  #: tuned arm -> control -> tuned minus control
    last: Mapping[str, Difference]  #: tuned arm -> its difference at both last layers, if any was allowed
    last_values: Mapping[str, float]  #: base and tuned arms -> the number at the last layer

    def level(self, arm: str) -> str:
        """An arm's number as text; empty without one."""
        return number_text(self.values[arm], not self.lower) if arm in self.values else ""


def rows_of(
    results: Results,
    arms: Mapping[str, Sequence[str]],
    trials: Sequence[Trial],
    primary: str,
    last: Results | None = None,
) -> list[Row]:
    """A row for each number, in the order in which they came.

    Args:
        results: scores at the layers that were chosen.
        arms: name -> its models; the base first. Arms of as many seeds as another one are paired with it seed by seed.
        last: scores of the base and of tuned arms at their last layers.
    """
    base, rows = next(iter(arms)), []
    for name in dict.fromkeys(name for scores in results.values() for name in scores):
        having, ends = (_having(name, of, arms) for of in (results, last or {}))
        first = next(iter(having.values()))[0]
        rows.append(
            Row(
                name,
                len(first.values),
                first.lower,
                {arm: _mean(seeds) for arm, seeds in having.items()},
                {arm: _minus(name, of, having[base]) for arm, of in having.items() if arm != base and base in having},
                {
                    one.arm: {arm: _minus(name, having[one.arm], having[arm]) for arm in one.controls if arm in having}
                    for one in trials
                    if one.arm in having
                },
                {one.arm: _minus(name, ends[one.arm], ends[base]) for one in trials if {one.arm, base} <= ends.keys()},
                {arm: _mean(seeds) for arm, seeds in ends.items()},
            )
        )
    return _decided(rows, primary)


def _decided(rows: Sequence[Row], primary: str) -> list[Row]:
    """Decide about all differences from the base but those of the primary number together."""
    shown = holm({(row.name, arm): of.p for row in rows if row.name != primary for arm, of in row.differences.items()})
    return [
        row
        if row.name == primary
        else replace(
            row, differences={arm: replace(of, shown=shown[row.name, arm]) for arm, of in row.differences.items()}
        )
        for row in rows
    ]


def _having(name: str, results: Results, arms: Mapping[str, Sequence[str]]) -> dict[str, list[Score]]:
    """Arm -> its scores of one number; without arms of which a model has none."""
    return {
        arm: [results[label][name] for label in labels]
        for arm, labels in arms.items()
        if all(name in results.get(label, ()) for label in labels)
    }


def _rng(name: str, part: str = "") -> np.random.Generator:
    """The same numbers every time the table is made."""
    return np.random.default_rng(zlib.crc32(f"{name}{part}".encode()))


def _mean(seeds: Sequence[Score]) -> float:
    return float(np.mean([score.value for score in seeds]))


def _minus(name: str, new: Sequence[Score], old: Sequence[Score]) -> Difference:
    """Difference of one number, over all seeds of both arms by the same draws."""
    count = max(len(new), len(old))
    news, olds = (list(part) * count if len(part) == 1 else list(part) for part in (new, old))
    assert all(score.values.shape == news[0].values.shape for score in (*news, *olds)), name
    groups = news[0].groups
    values = np.array([score.value - past.value for score, past in zip(news, olds, strict=True)])
    if news[0].values.ndim == 1:  # item by item
        pairs = zip(news, olds, strict=True)
        means = resampled([score.values - past.values for score, past in pairs], groups, _rng(name))
    else:
        drawn = resampled([score.values for score in (*news, *olds)], groups, _rng(name))
        means = drawn[:count] - drawn[count:]
    now, then = _retrained(news), _retrained(olds)
    retrained = None if now is None or then is None else now - then
    draws = combined(values, means, retrained, _rng(name, "others"))
    mean, units = float(values.mean()), len(news[0].values if groups is None else np.unique(groups))
    whole = interval(mean, draws)
    # That all of n units are of one sign comes by chance in 2^(1 - n) of cases, which resampling does not see.
    least = 2.0 ** (1 - min(units, 64))
    few = least > 1 - LEVEL  # fewer than six
    low, high = (min(whole.low, 0.0), max(whole.high, 0.0)) if few else (whole.low, whole.high)
    above, below = low > 0, high < 0
    return Difference(
        mean,
        low,
        high,
        max(two_sided(draws), least),
        better=below if news[0].lower else above,
        worse=above if news[0].lower else below,
        shown=above or below,
        alone=interval(mean, means.mean(axis=0)),
        detectable=(whole.high - whole.low) / 2 * (2.8 / 1.96),  # half an interval is 1.96 standard errors
        each=tuple(values.tolist()),
    )


def _retrained(seeds: Sequence[Score]) -> FloatArray | None:
    """(R,), mean over seeds of the number by retrained probes; None where nothing learns."""
    of = [score.retrained for score in seeds if score.retrained is not None]
    return np.mean(of, axis=0) if of else None


def section(rows: Sequence[Row], arms: Sequence[str], primary: str) -> Section:
    """The table for a console: a row for each number and arm; a difference with its interval, marked * if it is shown.

    Numbers are in percent, errors in their own unit.
    """
    base, *others = arms
    lines = []
    for row in rows:
        for arm in others:
            change = row.differences.get(arm)
            text = "" if change is None else f"{change.text(not row.lower)}{' *' if change.shown else ''}"
            lines.append([row.name, str(row.items), row.level(base), arm, row.level(arm), text])
    title = f"{LEVEL:.0%} intervals; * is significant: {primary} by its own interval, the others by Holm"
    return Section(title, lines, ["", "n", base, "", "", "difference"])
