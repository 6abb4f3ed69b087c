"""The verdict about a tuned model: one word for its primary number, and what it costs.

| word | |
|---|---|
| gained | above the base's best layer and its last, and above every control of equal feature shift |
| better placed | above the base only up to where the tuned model ends, or only at the last layers of both |
| moved, not gained | above the base's best layer, but not above a control |
| not shown | not above the base |
| lost | below the base's best layer |
| better, without control | above the base, but nothing else has its feature shift: the base is of another
  architecture, or no scale of a control reaches it |
| the same | no feature moved where the number is read |

The base is read at the best block of its whole tower, also where a tuned model ends earlier: that is what its
user has today. Each word asks for intervals of the primary number alone, several at once, so it needs no
correction. Where best layers were not looked for, "gained" is never said.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from visft_ds.evals.judge.table import Difference, Row, Trial
from visft_ds.evals.records import number_text


@dataclass(frozen=True)
class Verdict:
    """Verdict about a tuned variant."""

    variant: str
    word: str
    sentences: tuple[str, ...]  #: the verdict, its cost and what half the change gives


def judged(rows: Sequence[Row], trials: Sequence[Trial], primary: str, base: str) -> list[Verdict]:
    """The verdict about each tuned variant; `base` is the name of the one that all are compared with."""
    row = next(row for row in rows if row.name == primary)
    verdicts = []
    for trial in trials:
        tuned = trial.variant
        word, sentence = _decision(row, trial, base)
        sentences = [f"{sentence}.", f"Cost: {_cost(rows, row, tuned)}."]
        if word == "the same" and _nothing_differs(rows, tuned):
            sentences = [f"No feature of {tuned} differs from those of {base}."]
        if trial.half:
            change = _text(row.differences[trial.half], row)
            sentences.append(f"Half of the change gives {change}; cost: {_cost(rows, row, trial.half)}.")
        if trial.trained_on:
            sets = "; ".join(trial.trained_on)
            sentences.append(f"In domain: {tuned} was trained on images of {sets}.")
        verdicts.append(Verdict(tuned, word, tuple(sentences)))
    return verdicts


def _decision(row: Row, trial: Trial, base: str) -> tuple[str, str]:
    """The word of a verdict and its sentence, by the row of the primary number."""
    tuned = trial.variant
    gain = row.differences[tuned]
    change = _text(gain, row)
    if trial.shift == 0:
        sentence = f"Where {row.name} is read, {tuned} has the features of {base}"
        if trial.cut:
            sentence += f"; it ends after {trial.cut}, and differs by {change} from {base} at its best layer"
        return "the same", sentence
    by = f"{change} in {row.name}, {_where_read(trial, base)}"
    if not gain.better:
        return _without_gain(row, trial, base, by)
    better = f"{tuned} is better than {base} by {by}"
    over_last = row.over_last.get(tuned)
    if over_last is not None and not over_last.better:
        less = f"not shown to be better than {base} at its last layer ({_text(over_last, row)})"
        return "not shown", f"{better}, but {less}"
    controls = row.controls[tuned]
    failed = [name for name, over_control in controls.items() if not over_control.better]
    equal = f"of the same feature shift{_missed(trial)}"
    if failed:
        return (
            "moved, not gained",
            f"{better}, but not shown to be better than {' and '.join(failed)} {equal}",
        )
    if trial.shift is None:
        return "better, without control", f"{better}; two architectures have no control {equal}"
    if not trial.compared and (controls or not trial.missed):
        return "better placed", f"{better}; their best layers were not compared"
    if not controls:
        return "better, without control", f"{better}; no control is {equal}"
    return "gained", f"{better}, and better than {' and '.join(controls)} {equal}"


def _without_gain(row: Row, trial: Trial, base: str, by: str) -> tuple[str, str]:
    """The same of a variant that is not better than the base, but differs `by` so much."""
    tuned = trial.variant
    gain = row.differences[tuned]
    change = _text(gain, row)
    over_cut = row.over_cut.get(tuned)
    if over_cut is not None and over_cut.better:
        below = "worse" if gain.worse else "not shown to be better"
        return "better placed", (
            f"{tuned} is better than {base} by {_text(over_cut, row)} in {row.name} up to {trial.cut}, "
            f"where it ends, but {below} than {base} at its best layer ({change})"
        )
    if gain.worse:
        return "lost", f"{tuned} is worse than {base}: {by}"
    last = row.last.get(tuned)
    if last is not None and last.better:
        return "better placed", (
            f"{tuned} is better than {base} by {_text(last, row)} in {row.name} at their last layers, "
            f"but not shown to be better at their best ({change})"
        )
    power = "fewer than six items can show nothing"
    if gain.detectable is not None:
        least = number_text(gain.detectable, not row.lower)
        power = f"a difference of {least} would probably be shown"
    return "not shown", f"{tuned} minus {base} is {by}; {power}"


def _nothing_differs(rows: Sequence[Row], variant: str) -> bool:
    """Return True if a variant equals the base in every number, in every way in which they were compared."""
    changes = [differences.get(variant) for row in rows for differences in (row.differences, row.last)]
    return all(change.low == change.high == 0 for change in changes if change is not None)


def _text(difference: Difference, row: Row) -> str:
    return difference.text(not row.lower)


def _where_read(trial: Trial, base: str) -> str:
    """The layers that both models are read at, in words."""
    if not trial.compared:
        return "both at their last layers"
    if trial.named:
        return f"{base} at its best layer and {trial.variant} after {trial.named}"
    return "both at their best layers"


def _missed(trial: Trial) -> str:
    """The controls that no scale brings to the shift, in words."""
    if not trial.missed:
        return ""
    assert trial.shift is not None
    names = [f"{name} moves features by {shift:.3f} at most" for name, shift in trial.missed.items()]
    return f" ({trial.shift:.3f}; {', '.join(names)})"


def _cost(rows: Sequence[Row], primary: Row, variant: str) -> str:
    """The numbers that are worse than the base's by their own intervals, those marked that remain after
    correction; and the agreement with the predictions of its classifier.
    """
    others = 0
    worse = []
    agreements = []
    for row in rows:
        if row is primary or variant not in row.differences:
            continue
        if row.agreement:
            share = f"{row.level(variant)} % of the classifier's predictions are unchanged"
            agreements.append(f"{share} ({row.name})")
            continue
        others += 1
        change = row.differences[variant]
        if change.worse:
            worse.append(f"{row.name} {_text(change, row)}{' *' if change.shown else ''}")
    cost = (
        f"no other number of {others} is worse by its own interval"
        if others
        else "no other number was judged"
    )
    if worse:
        mark = "; * is shown among all of them" if any(loss.endswith("*") for loss in worse) else ""
        cost = f"{', '.join(worse)} ({len(worse)} of {others} other numbers, each by its own interval{mark})"
    return "; ".join([cost, *agreements])
