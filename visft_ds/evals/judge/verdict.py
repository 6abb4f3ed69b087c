"""The verdict about a tuned model: one word for its primary number, and what it costs.

    gained                   above the base's best layer and its last, and above every control of equal
    feature shift better placed            above the base only up to where the tuned model ends, or only at
    the last layers of both moved, not gained        above the base's best layer, but not above a control
    not shown                not above the base
    lost                     below the base's best layer
    better, without control  above the base, but nothing else has its feature shift: the base is of another
                             architecture, or no scale of a control reaches it
    the same                 no feature moved where the number is read

The base is read at the best block of its whole tower, also where a tuned model ends earlier: that is what its
user has today. Each word asks for intervals of the primary number alone, several at once, so it needs no
correction. Where best layers were not looked for, "gained" is never said.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from visft_ds.evals.judge.table import Difference, Row, Trial
from visft_ds.evals.records import number_text

_EQUAL = "of the same feature shift"


@dataclass(frozen=True)
class Verdict:
    """Verdict about a tuned arm."""

    arm: str
    word: str
    sentences: tuple[str, ...]  #: the verdict, its cost and what half the change gives


def judged(rows: Sequence[Row], trials: Sequence[Trial], primary: str, base: str) -> list[Verdict]:
    """The verdict about each tuned arm; `base` is the name of the one that all are compared with."""
    row = next(row for row in rows if row.name == primary)
    verdicts = []
    for trial in trials:
        word = word_for(row, trial)
        if word == "the same" and _nothing_differs(rows, trial.arm):
            sentences = [f"No feature of {trial.arm} differs from those of {base}."]
        else:
            sentences = [f"{_sentence(word, row, trial, base)}.", f"Cost: {_cost(rows, row, trial.arm)}."]
        if trial.half:
            change = row.differences[trial.half].text(not row.lower)
            sentences.append(f"Half of the change gives {change}; cost: {_cost(rows, row, trial.half)}.")
        if trial.trained_on:
            sentences.append(
                f"In domain: {trial.arm} was trained on images of {'; '.join(trial.trained_on)}."
            )
        verdicts.append(Verdict(trial.arm, word, tuple(sentences)))
    return verdicts


def word_for(row: Row, trial: Trial) -> str:
    """The word of a verdict, by the row of the primary number."""
    gain = row.differences[trial.arm]
    last = row.last.get(trial.arm)
    over_last = row.over_last.get(trial.arm)
    over_cut = row.over_cut.get(trial.arm)
    if trial.shift == 0:
        return "the same"
    if not gain.better:
        if over_cut and over_cut.better:
            return "better placed"
        if gain.worse:
            return "lost"
        return "better placed" if last and last.better else "not shown"
    if over_last and not over_last.better:
        return "not shown"
    if not all(of_control.better for of_control in row.controls[trial.arm].values()):
        return "moved, not gained"
    if trial.shift is None or (trial.missed and not trial.controls):
        return "better, without control"
    if not trial.compared:
        return "better placed"
    return "gained" if trial.controls else "better, without control"


def _nothing_differs(rows: Sequence[Row], arm: str) -> bool:
    """Return True if an arm equals the base in every number, in every way in which they were compared."""
    changes = [of_arms[arm] for row in rows for of_arms in (row.differences, row.last) if arm in of_arms]
    return all(change.low == change.high == 0 for change in changes)


def _sentence(word: str, row: Row, trial: Trial, base: str) -> str:
    arm = trial.arm
    gain = row.differences[arm]
    by = f"{_text(gain, row)} in {row.name}, {_places(trial, base)}"
    better = f"{arm} is better than {base} by {by}"
    if word == "the same":
        same = f"Where {row.name} is read, {arm} has the features of {base}"
        ends = f"; it ends after {trial.cut}, and differs by {_text(gain, row)} from {base} at its best layer"
        return f"{same}{ends if trial.cut else ''}"
    if word == "better placed":
        return _better_placed(better, row, trial, base)
    if word == "gained":
        return f"{better}, and better than {' and '.join(row.controls[arm])} {_EQUAL}{_missed(trial)}"
    if word == "moved, not gained":
        failed = [name for name, of_control in row.controls[arm].items() if not of_control.better]
        return f"{better}, but not shown to be better than {' and '.join(failed)} {_EQUAL}{_missed(trial)}"
    if word == "better, without control":
        if trial.shift is None:
            return f"{better}; two architectures have no control {_EQUAL}"
        return f"{better}; no control is {_EQUAL}{_missed(trial)}"
    if word == "lost":
        return f"{arm} is worse than {base} by {by}"
    if gain.better:
        over_last = _text(row.over_last[arm], row)
        return f"{better}, but not shown to be better than {base} at its last layer ({over_last})"
    if gain.detectable is None:
        return f"{arm} minus {base} is {by}; fewer than six items can show nothing"
    least = number_text(gain.detectable, not row.lower)
    return f"{arm} minus {base} is {by}; a difference of {least} would probably be shown"


def _better_placed(better: str, row: Row, trial: Trial, base: str) -> str:
    gain = row.differences[trial.arm]
    over_cut = row.over_cut.get(trial.arm)
    if gain.better:
        return f"{better}; their best layers were not compared"
    if over_cut and over_cut.better:
        below = "worse" if gain.worse else "not shown to be better"
        return (
            f"{trial.arm} is better than {base} by {_text(over_cut, row)} in {row.name} up to {trial.cut}, where it "
            f"ends, but {below} than {base} at its best layer ({_text(gain, row)})"
        )
    return (
        f"{trial.arm} is better than {base} by {_text(row.last[trial.arm], row)} in {row.name} at their last layers, "
        f"but not shown to be better at their best ({_text(gain, row)})"
    )


def _text(difference: Difference, row: Row) -> str:
    return difference.text(not row.lower)


def _places(trial: Trial, base: str) -> str:
    """The layers that both models are read at, in words."""
    if not trial.compared:
        return "both at their last layers"
    if trial.named:
        return f"{base} at its best layer and {trial.arm} after {trial.named}"
    return "both at their best layers"


def _missed(trial: Trial) -> str:
    """The controls that no scale brings to the shift, in words."""
    if not trial.missed:
        return ""
    assert trial.shift is not None
    names = [f"{name} moves features by {shift:.3f} at most" for name, shift in trial.missed.items()]
    return f" ({trial.shift:.3f}; {', '.join(names)})"


def _cost(rows: Sequence[Row], primary: Row, arm: str) -> str:
    """The numbers that are worse than the base's by their own intervals, those marked that remain after
    correction; and the kept predictions of its classifier."""
    having = [row for row in rows if row is not primary and arm in row.differences]
    others = [row for row in having if not row.agreement]
    worse = []
    for row in others:
        change = row.differences[arm]
        if change.worse:
            worse.append(f"{row.name} {_text(change, row)}{' *' if change.shown else ''}")
    if worse:
        mark = "; * is shown among all of them" if any(text.endswith("*") for text in worse) else ""
        parts = [
            f"{', '.join(worse)} ({len(worse)} of {len(others)} other numbers, each by its own interval{mark})"
        ]
    elif others:
        parts = [f"no other number of {len(others)} is worse by its own interval"]
    else:
        parts = ["no other number was judged"]
    for row in having:
        if row.agreement:
            parts.append(f"{row.level(arm)} % of the classifier's predictions are unchanged ({row.name})")
    return "; ".join(parts)
