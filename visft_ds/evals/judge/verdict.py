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

_EQUAL = "of the same feature shift"


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
        word = word_for(row, trial)
        if word == "the same" and _nothing_differs(rows, trial.variant):
            sentences = [f"No feature of {trial.variant} differs from those of {base}."]
        else:
            sentences = [f"{_sentence(word, row, trial, base)}.", f"Cost: {_cost(rows, row, trial.variant)}."]
        if trial.half:
            change = _text(row.differences[trial.half], row)
            sentences.append(f"Half of the change gives {change}; cost: {_cost(rows, row, trial.half)}.")
        if trial.trained_on:
            sets = "; ".join(trial.trained_on)
            sentences.append(f"In domain: {trial.variant} was trained on images of {sets}.")
        verdicts.append(Verdict(trial.variant, word, tuple(sentences)))
    return verdicts


def word_for(row: Row, trial: Trial) -> str:
    """The word of a verdict, by the row of the primary number."""
    tuned = trial.variant
    gain = row.differences[tuned]
    if trial.shift == 0:
        return "the same"
    if not gain.better:
        if _is_better(row.over_cut.get(tuned)):
            return "better placed"
        if gain.worse:
            return "lost"
        return "better placed" if _is_better(row.last.get(tuned)) else "not shown"
    if tuned in row.over_last and not row.over_last[tuned].better:
        return "not shown"
    if not all(over_control.better for over_control in row.controls[tuned].values()):
        return "moved, not gained"
    if trial.shift is None or (trial.missed and not trial.controls):
        return "better, without control"
    if not trial.compared:
        return "better placed"
    return "gained" if trial.controls else "better, without control"


def _is_better(difference: Difference | None) -> bool:
    return difference is not None and difference.better


def _nothing_differs(rows: Sequence[Row], variant: str) -> bool:
    """Return True if a variant equals the base in every number, in every way in which they were compared."""
    for row in rows:
        for differences in (row.differences, row.last):
            if variant in differences:
                change = differences[variant]
                if change.low != 0 or change.high != 0:
                    return False
    return True


def _sentence(word: str, row: Row, trial: Trial, base: str) -> str:
    tuned = trial.variant
    gain = row.differences[tuned]
    by = f"{_text(gain, row)} in {row.name}, {_where_read(trial, base)}"
    better = f"{tuned} is better than {base} by {by}"
    if word == "the same":
        same = f"Where {row.name} is read, {tuned} has the features of {base}"
        if not trial.cut:
            return same
        differs = f"differs by {_text(gain, row)} from {base} at its best layer"
        return f"{same}; it ends after {trial.cut}, and {differs}"
    if word == "better placed":
        return _better_placed(better, row, trial, base)
    if word == "gained":
        controls = " and ".join(row.controls[tuned])
        return f"{better}, and better than {controls} {_EQUAL}{_missed(trial)}"
    if word == "moved, not gained":
        over_controls = row.controls[tuned]
        failed = " and ".join(name for name in over_controls if not over_controls[name].better)
        return f"{better}, but not shown to be better than {failed} {_EQUAL}{_missed(trial)}"
    if word == "better, without control":
        if trial.shift is None:
            return f"{better}; two architectures have no control {_EQUAL}"
        return f"{better}; no control is {_EQUAL}{_missed(trial)}"
    if word == "lost":
        return f"{tuned} is worse than {base}: {by}"
    assert word == "not shown", word
    if gain.better:
        over_last = _text(row.over_last[tuned], row)
        return f"{better}, but not shown to be better than {base} at its last layer ({over_last})"
    if gain.detectable is None:
        return f"{tuned} minus {base} is {by}; fewer than six items can show nothing"
    least = number_text(gain.detectable, not row.lower)
    return f"{tuned} minus {base} is {by}; a difference of {least} would probably be shown"


def _better_placed(better: str, row: Row, trial: Trial, base: str) -> str:
    tuned = trial.variant
    gain = row.differences[tuned]
    if gain.better:
        return f"{better}; their best layers were not compared"
    if _is_better(row.over_cut.get(tuned)):
        below = "worse" if gain.worse else "not shown to be better"
        return (
            f"{tuned} is better than {base} by {_text(row.over_cut[tuned], row)} in {row.name} up to "
            f"{trial.cut}, where it ends, but {below} than {base} at its best layer ({_text(gain, row)})"
        )
    return (
        f"{tuned} is better than {base} by {_text(row.last[tuned], row)} in {row.name} at their last layers, "
        f"but not shown to be better at their best ({_text(gain, row)})"
    )


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
    is_marked = False
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
            is_marked |= change.shown
    if worse:
        mark = "; * is shown among all of them" if is_marked else ""
        cost = f"{', '.join(worse)} ({len(worse)} of {others} other numbers, each by its own interval{mark})"
    elif others:
        cost = f"no other number of {others} is worse by its own interval"
    else:
        cost = "no other number was judged"
    return "; ".join([cost, *agreements])
