"""The table of a comparison: each number of each arm, and its differences.

An arm is a model, or several of one recipe with different seeds. The first arm is the base. Differences are
taken item by item before they are resampled: two models that fail on the same images differ surely by little,
even if each of their numbers alone is unsure.

One number, the primary, decides by its own intervals. Of the other numbers each has its own interval, too;
which differences of tuned arms from the base remain if all of them are asked about together says Holm's
method.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from visft_ds.evals.judge.benchmark import FloatArray, Number, Score
from visft_ds.evals.judge.intervals import LEVEL, combined, holm, interval, resampled, spread_of
from visft_ds.evals.records import Interval, number_text
from visft_ds.monitor.console import Section

Results = Mapping[str, Mapping[str, Score]]  #: model -> name -> score


@dataclass(frozen=True)
class Trial:
    """A tuned arm, and what it is judged by beside the base."""

    arm: str
    controls: tuple[str, ...] = ()  #: arms at its shift: noise, and what `--control` named
    half: str | None = None  #: the arm of half its change
    shift: float | None = None  #: how far it moved the base's features; None if it is of another architecture
    missed: Mapping[str, float] = field(
        default_factory=dict
    )  #: control that no scale brings to the shift -> its shift
    compared: bool = False  #: the best layers were looked for, by the primary number
    cut: str | None = None  #: the block that it ends after, if the base goes on
    named: str | None = None  #: the block that it is read after, if nobody could choose it
    trained_on: tuple[str, ...] = ()  #: data sets with images that it was trained on, in words


@dataclass(frozen=True)
class Difference(Interval):
    """Difference of two arms, over test items, training images and seeds."""

    p: float  #: of zero, two-sided
    better: bool  #: the whole interval is
    worse: bool
    shown: bool  #: by its own interval; of numbers beside the primary one also after Holm's correction
    alone: Interval  #: over test items alone
    detectable: (
        float | None
    )  #: the least true difference that its interval would show in four of five repetitions
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
    # Of the primary number alone, by tuned arms:
    last: Mapping[str, Difference]  #: difference at both last layers
    over_last: Mapping[str, Difference]  #: the arm where it is read minus the base at its last layer
    over_cut: Mapping[str, Difference]  #: the arm minus the base at its best layer up to where the arm ends
    last_values: Mapping[str, float]  #: base and tuned arms -> the number at the last layer
    cut_values: Mapping[str, float]  #: tuned arm -> the number of the base up to where the arm ends
    agreement: bool = False  #: the share of the base's answers that an arm gives, too

    def level(self, arm: str) -> str:
        """An arm's number as text; empty without one."""
        return number_text(self.values[arm], not self.lower) if arm in self.values else ""


def rows_of(
    results: Results,
    arms: Mapping[str, Sequence[str]],
    trials: Sequence[Trial],
    primary: str,
    last: Results | None = None,
    cut: Results | None = None,
    numbers: Mapping[str, Number] | None = None,
) -> list[Row]:
    """A row for each number, in the order in which they came.

    Args:
        results: scores at the layers that were chosen.
        arms: name -> its models; the base first. Arms of as many seeds as another one are paired with it seed
        by seed.
        last: scores of the base and of tuned arms at their last layers.
        cut: scores of the base up to where tuned arms end, by their names.
        numbers: what is known of the numbers, by their names; more is better where nothing is.
    """
    names = dict.fromkeys(name for scores in results.values() for name in scores)
    rows = []
    for name in names:
        number = (numbers or {}).get(name) or Number(name, how="")
        rows.append(_row(name, number, results, arms, trials, last or {}, cut or {}))
    return _decided(rows, primary, [trial.arm for trial in trials])


def _row(
    name: str,
    number: Number,
    results: Results,
    arms: Mapping[str, Sequence[str]],
    trials: Sequence[Trial],
    last: Results,
    cut: Results,
) -> Row:
    def minus(new: Sequence[Score], old: Sequence[Score]) -> Difference:
        return _minus(name, new, old, lower=number.lower)

    base = next(iter(arms))
    having = _having(name, results, arms)
    ends = _having(name, last, arms)
    cuts = {arm: [scores[name]] for arm, scores in cut.items() if name in scores}
    tuned = [trial.arm for trial in trials if trial.arm in having]
    first = next(iter(having.values()))[0]
    others = [arm for arm in having if arm != base and base in having]
    controls: dict[str, dict[str, Difference]] = {}
    for trial in trials:
        if trial.arm in having:
            present = [control for control in trial.controls if control in having]
            controls[trial.arm] = {control: minus(having[trial.arm], having[control]) for control in present}
    both_end = [arm for arm in tuned if arm in ends and base in ends]
    return Row(
        name=name,
        items=len(first.values),
        lower=number.lower,
        agreement=number.agreement,
        values={arm: _mean(seeds) for arm, seeds in having.items()},
        differences={arm: minus(having[arm], having[base]) for arm in others},
        controls=controls,
        last={arm: minus(ends[arm], ends[base]) for arm in both_end},
        over_last={arm: minus(having[arm], ends[base]) for arm in both_end},
        over_cut={arm: minus(having[arm], cuts[arm]) for arm in tuned if arm in cuts},
        last_values={arm: _mean(seeds) for arm, seeds in ends.items()},
        cut_values={arm: _mean(seeds) for arm, seeds in cuts.items()},
    )


def _decided(rows: Sequence[Row], primary: str, tuned: Sequence[str]) -> list[Row]:
    """Decide about the differences of tuned arms from the base in all numbers but the primary one together;
    nobody asks whether controls differ in these."""
    others = [row for row in rows if row.name != primary]
    asked = {
        (row.name, arm): row.differences[arm].p for row in others for arm in tuned if arm in row.differences
    }
    survives = holm(asked)
    decided = []
    for row in rows:
        if row.name == primary:
            decided.append(row)
            continue
        differences = {}
        for arm, of_arm in row.differences.items():
            shown = of_arm.shown and survives.get((row.name, arm), False)
            differences[arm] = replace(of_arm, shown=shown)
        decided.append(replace(row, differences=differences))
    return decided


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


def _minus(name: str, new: Sequence[Score], old: Sequence[Score], *, lower: bool) -> Difference:
    """Difference of one number, over all seeds of both arms by the same draws."""
    count = max(len(new), len(old))
    news = list(new) * count if len(new) == 1 else list(new)
    olds = list(old) * count if len(old) == 1 else list(old)
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
    whole = interval(float(values.mean()), combined(values, means, retrained, _rng(name, "others")))
    units = len(news[0].values if groups is None else np.unique(groups))
    spread = spread_of(values, means, retrained, units)
    # That all of n units are of one sign comes by chance in 2^(1 - n) of cases, which resampling does not
    # see.
    least = 2.0 ** (1 - min(units, 64))
    few = least > 1 - LEVEL  # fewer than six
    low = min(whole.low, 0.0) if few else whole.low
    high = max(whole.high, 0.0) if few else whole.high
    above, below = low > 0, high < 0
    return Difference(
        whole.value,
        low,
        high,
        max(spread.two_sided(whole.value), least),
        better=below if lower else above,
        worse=above if lower else below,
        shown=above or below,
        alone=interval(whole.value, means.mean(axis=0)),
        detectable=None if few else spread.detectable,
        each=tuple(values.tolist()),
    )


def _retrained(seeds: Sequence[Score]) -> FloatArray | None:
    """(R,), mean over seeds of the number by retrained probes; None where nothing learns."""
    of = [score.retrained for score in seeds if score.retrained is not None]
    return np.mean(of, axis=0) if of else None


def section(rows: Sequence[Row], arms: Sequence[str], primary: str) -> Section:
    """The table for a console: a row for each number and arm; a difference with its interval, marked * if it
    is shown.

    Numbers are in percent, errors in their own unit.
    """
    base, *others = arms
    lines = []
    for row in rows:
        for arm in others:
            change = row.differences.get(arm)
            text = "" if change is None else f"{change.text(not row.lower)}{' *' if change.shown else ''}"
            lines.append([row.name, str(row.items), row.level(base), arm, row.level(arm), text])
    title = f"{LEVEL:.0%} intervals; * is shown: {primary} by itself, others of tuned models after Holm's correction"
    return Section(title, lines, ["", "n", base, "", "", "difference"])
