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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from visft_ds.evals.judge.table import Row, Trial
from visft_ds.evals.records import Interval

KEPT = "kept/"  #: beginning of the numbers that count kept answers of the base's classifier


@dataclass(frozen=True)
class Verdict:
    """Verdict about a tuned arm."""

    arm: str
    word: str
    sentences: tuple[str, ...]  #: the verdict, its price and what half the change gives


def judged(rows: Sequence[Row], trials: Sequence[Trial], primary: str, base: str, best: bool = True) -> list[Verdict]:
    """The verdict about each tuned arm.

    Args:
        base: name of the arm that all are compared with.
        best: each model was read at its best layer; otherwise all at their last.
    """
    (row,) = (row for row in rows if row.name == primary)
    return [_about(row, rows, trial, base, best) for trial in trials]


def word_for(
    gain: Interval,
    last: Interval | None,
    controls: Mapping[str, Interval],
    dose: float | None,
    *,
    same: bool,
    best: bool,
) -> str:
    """The word of a verdict; intervals are of differences where above zero is better.

    Args:
        gain: tuned minus base.
        last: the same at the last layers of both.
        controls: tuned minus each control.
        dose: how far features moved; None between two architectures.
        same: every difference is zero.
        best: the gain is at the best layers of both.
    """
    if same and dose == 0:
        return "the same"
    if gain.high < 0:
        return "lost"
    if gain.low > 0:
        if dose is None:
            return "better, without control"
        if any(of.low <= 0 for of in controls.values()):
            return "moved, not gained"
        return "gained" if best else "better placed"
    return "better placed" if last is not None and last.low > 0 else "not shown"


def _about(row: Row, rows: Sequence[Row], trial: Trial, base: str, best: bool) -> Verdict:
    arm, percent = trial.arm, not row.lower
    gain, last = row.differences[arm], row.last.get(arm)
    controls = {name: _upwards(of, row.lower) for name, of in row.controls[arm].items()}
    changes = [*(of.differences[arm] for of in rows if arm in of.differences), *([last] if last else [])]
    word = word_for(
        _upwards(gain, row.lower),
        None if last is None else _upwards(last, row.lower),
        controls,
        trial.dose,
        same=all(one.low == one.high == 0 for one in changes),
        best=best,
    )
    by = f"{gain.text(percent=percent)} in {row.name}, both at their {'best' if best else 'last'} layers"
    better, equal = f"{arm} is better than {base} by {by}", "of the same feature shift"
    failed = " and ".join(name for name, of in controls.items() if of.low <= 0)
    least = f"{100 * gain.detectable:.2f}" if percent else f"{gain.detectable:.3f}"
    could = f"; a difference of {least} would probably be shown" if gain.detectable else ""
    said = {
        "the same": f"No feature of {arm} differs from those of {base}",
        "gained": f"{better}, and better than {' and '.join(controls)} {equal}",
        "moved, not gained": f"{better}, but not shown to be better than {failed} {equal}",
        "better, without control": f"{better}; two architectures have no control {equal}",
        "better placed": f"{better}; their best layers were not compared",
        "lost": f"{arm} is worse than {base} by {by}",
        "not shown": f"{arm} minus {base} is {by}, and the interval holds zero{could}",
    }
    if last and word == "better placed":
        said[word] = (
            f"{arm} is better than {base} by {last.text(percent=percent)} in {row.name} at their last layers, but not "
            f"shown to be better at their best ({gain.text(percent=percent)})"
        )
    sentences = [f"{said[word]}."]
    if word != "the same":
        sentences.append(f"Price: {_price(rows, row, arm)}.")
        if trial.half:
            change = row.differences[trial.half].text(percent=percent)
            sentences.append(f"Half of the change gives {change}; price: {_price(rows, row, trial.half)}.")
    return Verdict(arm, word, tuple(sentences))


def _upwards(of: Interval, lower: bool) -> Interval:
    """A difference of which more is better."""
    return Interval(-of.value, -of.high, -of.low) if lower else of


def _price(rows: Sequence[Row], primary: Row, arm: str) -> str:
    """The numbers that are shown to be worse than the base's, and the answers of its classifier that are kept."""
    others = [row for row in rows if row is not primary and arm in row.differences and not row.name.startswith(KEPT)]
    worse = [
        f"{row.name} {row.differences[arm].text(percent=not row.lower)}"
        for row in others
        if row.differences[arm].shown and _upwards(row.differences[arm], row.lower).value < 0
    ]
    nothing = f"no other number of {len(others)} is shown to be worse" if others else "no other number was judged"
    kept = [row for row in rows if row.name.startswith(KEPT) and arm in row.values]
    answers = [f"{row.level(arm)} % of the classifier's answers are unchanged ({row.name})" for row in kept]
    return "; ".join([", ".join(worse) or nothing, *answers])
