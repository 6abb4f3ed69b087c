"""The verdict about a tuned model: one word for its primary number, and what it costs.

    gained                   above the base's best layer, and above noise and every control at the same feature shift
    better placed            above the base's last layer, both read at their last, but not above its best
    moved, not gained        above the base's best layer, but not above a control
    not shown                the interval holds zero
    lost                     the interval lies below zero
    better, without control  above the base, which is of another architecture: no feature shift, no control
    the same                 no feature differs

Each word asks for intervals of the primary number alone, several at once, so it needs no correction. Where last layers
alone were compared, "gained" is never said.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from visft_ds.evals.judge.table import Row, Trial
from visft_ds.evals.records import number_text

KEPT = "kept/"  #: beginning of the numbers that count kept predictions of the base's classifier


@dataclass(frozen=True)
class Verdict:
    """Verdict about a tuned arm."""

    arm: str
    word: str
    sentences: tuple[str, ...]  #: the verdict, its cost and what half the change gives


def judged(rows: Sequence[Row], trials: Sequence[Trial], primary: str, base: str) -> list[Verdict]:
    """The verdict about each tuned arm; `base` is the name of the one that all are compared with."""
    (row,) = (row for row in rows if row.name == primary)
    found = []
    for trial in trials:
        changes = [of.get(trial.arm) for each in rows for of in (each.differences, each.last)]
        same = all(change.low == change.high == 0 for change in changes if change)
        word = word_for(row, trial, same)
        sentences = [f"{_sentence(word, row, trial.arm, base)}."]
        if word != "the same":
            sentences.append(f"Cost: {_cost(rows, row, trial.arm)}.")
            if trial.half:
                change = row.differences[trial.half].text(not row.lower)
                sentences.append(f"Half of the change gives {change}; cost: {_cost(rows, row, trial.half)}.")
        found.append(Verdict(trial.arm, word, tuple(sentences)))
    return found


def word_for(row: Row, trial: Trial, same: bool) -> str:
    """The word of a verdict by the row of the primary number; `same`: every difference is zero."""
    gain, last = row.differences[trial.arm], row.last.get(trial.arm)
    if same and trial.shift == 0:
        return "the same"
    if gain.worse:
        return "lost"
    if not gain.better:
        return "better placed" if last and last.better else "not shown"
    if trial.shift is None:
        return "better, without control"
    if not all(of.better for of in row.controls[trial.arm].values()):
        return "moved, not gained"
    return "gained" if last else "better placed"


def _sentence(word: str, row: Row, arm: str, base: str) -> str:
    gain, percent, controls = row.differences[arm], not row.lower, row.controls[arm]
    if word == "better placed" and row.last:
        return (
            f"{arm} is better than {base} by {row.last[arm].text(percent)} in {row.name} at their last layers, but not "
            f"shown to be better at their best ({gain.text(percent)})"
        )
    by = f"{gain.text(percent)} in {row.name}, both at their {'best' if row.last else 'last'} layers"
    better, equal = f"{arm} is better than {base} by {by}", "of the same feature shift"
    failed = " and ".join(name for name, of in controls.items() if not of.better)
    least = number_text(gain.detectable, percent)
    return {
        "the same": f"No feature of {arm} differs from those of {base}",
        "gained": f"{better}, and better than {' and '.join(controls)} {equal}",
        "moved, not gained": f"{better}, but not shown to be better than {failed} {equal}",
        "better, without control": f"{better}; two architectures have no control {equal}",
        "better placed": f"{better}; their best layers were not compared",
        "lost": f"{arm} is worse than {base} by {by}",
        "not shown": f"{arm} minus {base} is {by}; a difference of {least} would probably be shown",
    }[word]


def _cost(rows: Sequence[Row], primary: Row, arm: str) -> str:
    """The numbers that are shown to be worse than the base's, and the kept predictions of its classifier."""
    having = [row for row in rows if row is not primary and arm in row.differences]
    others = [row for row in having if not row.name.startswith(KEPT)]
    changes = [(row, row.differences[arm]) for row in others]
    worse = [f"{row.name} {of.text(not row.lower)}" for row, of in changes if of.shown and of.worse]
    nothing = f"no other number of {len(others)} is shown to be worse" if others else "no other number was judged"
    kept = [
        f"{row.level(arm)} % of the classifier's predictions are unchanged ({row.name})"
        for row in having
        if row not in others
    ]
    return "; ".join([", ".join(worse) or nothing, *kept])
