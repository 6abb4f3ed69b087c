"""The table of a comparison: each number of each variant, and its differences.

A variant is a model, or several of one recipe with different seeds. The first one is the base. Differences
are taken item by item before they are resampled: two models that fail on the same images differ surely by
little, even if each of their numbers alone is unsure.

One number, the primary, decides by its own intervals. Of the other numbers each has its own interval, too;
which differences of tuned variants from the base remain if all of them are asked about together says Holm's
method.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import cycle, islice

import numpy as np

from visft_ds.evals.judge.benchmark import FloatArray, Number, Score
from visft_ds.evals.judge.intervals import LEVEL, combined, holm, interval, resampled, spread_of
from visft_ds.evals.records import Interval, number_text
from visft_ds.monitor.console import Section

Results = Mapping[str, Mapping[str, Score]]  #: model -> full name of a number -> score


@dataclass(frozen=True)
class Trial:
    """A tuned variant, and what it is judged by beside the base."""

    variant: str
    controls: tuple[str, ...] = ()  #: variants at its shift: noise, and what `--control` named
    half: str | None = None  #: the variant of half its change
    shift: float | None = None  #: how far it moved the base's features; None if it is of another architecture
    #: Control that no scale brings to the shift -> its shift.
    missed: Mapping[str, float] = field(default_factory=dict)
    compared: bool = False  #: the best layers were looked for, by the primary number
    cut: str | None = None  #: the block that it ends after, if the base goes on
    named: str | None = None  #: the block that it is read after, if nobody could choose it
    trained_on: tuple[str, ...] = ()  #: data sets with images that it was trained on, in words


@dataclass(frozen=True)
class Difference(Interval):
    """Difference of two variants, over test items, training images and seeds."""

    p: float  #: of zero, two-sided
    better: bool  #: the whole interval is
    worse: bool
    shown: bool  #: by its own interval; of numbers beside the primary one also after Holm's correction
    alone: Interval  #: over test items alone
    #: The least true difference that its interval would show in four of five repetitions.
    detectable: float | None
    each: tuple[float, ...]  #: of each seed


Differences = dict[str, Difference]  #: by variant, or by control


@dataclass(frozen=True)
class Row:
    """Row of a table: one number of all variants."""

    name: str
    items: int
    lower: bool  #: is better, as of an error
    values: Mapping[str, float]  #: variant -> its number; without variants that have none
    differences: Differences  #: variant -> its number minus the base's
    controls: dict[str, Differences]  #: tuned variant -> control -> tuned minus control
    # Of the primary number alone, by tuned variants:
    last: Differences  #: difference at both last layers
    over_last: Differences  #: the variant where it is read minus the base at its last layer
    over_cut: Differences  #: the variant minus the base at its best layer up to where it ends
    last_values: Mapping[str, float]  #: base and tuned variants -> the number at the last layer
    cut_values: Mapping[str, float]  #: tuned variant -> the number of the base up to where the variant ends
    agreement: bool = False  #: the share of the base's answers that a variant gives, too

    def level(self, variant: str) -> str:
        """A variant's number as text; empty without one."""
        return number_text(self.values[variant], not self.lower) if variant in self.values else ""


def rows_of(
    results: Results,
    variants: Mapping[str, Sequence[str]],
    trials: Sequence[Trial],
    primary: str,
    last: Results | None = None,
    cut: Results | None = None,
    numbers: Mapping[str, Number] | None = None,
) -> list[Row]:
    """A row for each number, in the order in which they came.

    Args:
        results: scores at the layers that were chosen.
        variants: name -> its models; the base first. Variants of as many seeds as another one are paired with
            it seed by seed.
        last: scores of the base and of tuned variants at their last layers.
        cut: scores of the base up to where tuned variants end, by their names.
        numbers: what is known of the numbers, by their full names; more is better where nothing is.
    """
    base = next(iter(variants))
    rows = []
    for name in dict.fromkeys(name for scores in results.values() for name in scores):
        number = (numbers or {}).get(name) or Number(name, how="")
        minus = partial(_minus, name, lower=number.lower)
        scores = _having(name, results, variants)
        at_last = _having(name, last or {}, variants)
        of_cuts = _having(name, cut or {}, {variant: [variant] for variant in cut or ()})
        row = Row(
            name=name,
            items=len(next(iter(scores.values()))[0].values),
            lower=number.lower,
            agreement=number.agreement,
            values=_means(scores),
            differences={},
            controls={},
            last={},
            over_last={},
            over_cut={},
            last_values=_means(at_last),
            cut_values=_means(of_cuts),
        )
        if base in scores:
            others = [variant for variant in scores if variant != base]
            row.differences.update((variant, minus(scores[variant], scores[base])) for variant in others)
        for trial in trials:
            tuned = trial.variant
            if tuned not in scores:
                continue
            present = [control for control in trial.controls if control in scores]
            row.controls[tuned] = {control: minus(scores[tuned], scores[control]) for control in present}
            if tuned in at_last and base in at_last:
                row.last[tuned] = minus(at_last[tuned], at_last[base])
                row.over_last[tuned] = minus(scores[tuned], at_last[base])
            if tuned in of_cuts:
                row.over_cut[tuned] = minus(scores[tuned], of_cuts[tuned])
        rows.append(row)
    _correct(rows, primary, [trial.variant for trial in trials])
    return rows


_Scores = Mapping[str, Sequence[Score]]  # variant -> scores of its seeds, of one number


def _having(name: str, results: Results, variants: Mapping[str, Sequence[str]]) -> _Scores:
    """The scores of one number; without variants of which a model has none."""
    return {
        variant: [results[label][name] for label in labels]
        for variant, labels in variants.items()
        if all(name in results.get(label, ()) for label in labels)
    }


def _means(scores: _Scores) -> dict[str, float]:
    """Variant -> its number, the mean over its seeds."""
    return {variant: float(np.mean([score.value for score in seeds])) for variant, seeds in scores.items()}


def _correct(rows: Sequence[Row], primary: str, tuned: Sequence[str]) -> None:
    """Decide about the differences of tuned variants from the base in all numbers but the primary one
    together; nobody asks whether controls differ in these.
    """
    others = [row for row in rows if row.name != primary]
    p_values: dict[tuple[str, str], float] = {}
    for row in others:
        for variant in tuned:
            if variant in row.differences:
                p_values[row.name, variant] = row.differences[variant].p
    surviving = holm(p_values)
    for row in others:
        for variant, difference in row.differences.items():
            if (row.name, variant) not in surviving:
                row.differences[variant] = replace(difference, shown=False)


def _minus(name: str, new: Sequence[Score], old: Sequence[Score], *, lower: bool) -> Difference:
    """Difference of one number, over all seeds of both variants by the same draws.

    Args:
        lower: is better.
    """
    seeds = max(len(new), len(old))
    pairs = list(islice(zip(cycle(new), cycle(old), strict=True), seeds))  # one model stands for each seed
    first = new[0]
    assert all(score.values.shape == first.values.shape for score in (*new, *old)), name

    values = np.array([now.value - before.value for now, before in pairs])
    if first.values.ndim == 1:  # item by item
        changes = [now.values - before.values for now, before in pairs]
        means = resampled(changes, first.groups, _rng(name))
    else:
        both = [score.values for scores in zip(*pairs, strict=True) for score in scores]
        drawn = resampled(both, first.groups, _rng(name))
        means = drawn[:seeds] - drawn[seeds:]
    retrained = None
    of_new = _retrained(new)
    of_old = _retrained(old)
    if of_new is not None and of_old is not None:
        retrained = of_new - of_old

    whole = interval(float(values.mean()), combined(values, means, retrained, _rng(name, "others")))
    units = len(first.values if first.groups is None else np.unique(first.groups))
    spread = spread_of(values, means, retrained, units)
    # That all of n units are of one sign comes by chance in 2^(1 - n) of cases, unseen by resampling.
    least = 2.0 ** (1 - min(units, 64))
    few = least > 1 - LEVEL  # fewer than six
    low = min(whole.low, 0.0) if few else whole.low
    high = max(whole.high, 0.0) if few else whole.high
    above = low > 0
    below = high < 0
    return Difference(
        whole.value,
        low,
        high,
        p=max(spread.two_sided(whole.value), least),
        better=below if lower else above,
        worse=above if lower else below,
        shown=above or below,
        alone=interval(whole.value, means.mean(axis=0)),
        detectable=None if few else spread.detectable,
        each=tuple(values.tolist()),
    )


def _retrained(scores: Sequence[Score]) -> FloatArray | None:
    """(R,), mean over seeds of the number by retrained probes; None where nothing learns."""
    of_seeds = [score.retrained for score in scores if score.retrained is not None]
    return np.mean(of_seeds, axis=0) if of_seeds else None


def _rng(name: str, purpose: str = "") -> np.random.Generator:
    """The same random numbers every time the table is made."""
    return np.random.default_rng(zlib.crc32(f"{name}{purpose}".encode()))


def section(rows: Sequence[Row], variants: Sequence[str], primary: str) -> Section:
    """The table for a console: a row for each number and variant; a difference with its interval, marked * if
    it is shown.

    Numbers are in percent, errors in their own unit.
    """
    base = variants[0]
    lines = []
    for row in rows:
        for variant in variants[1:]:
            text = ""
            if variant in row.differences:
                change = row.differences[variant]
                text = change.text(not row.lower) + (" *" if change.shown else "")
            lines.append([row.name, str(row.items), row.level(base), variant, row.level(variant), text])
    mark = f"* is shown: {primary} by itself, others of tuned models after Holm's correction"
    return Section(f"{LEVEL:.0%} intervals; {mark}", lines, ["", "n", base, "", "", "difference"])
