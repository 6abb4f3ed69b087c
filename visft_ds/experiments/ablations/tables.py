"""The numbers of a question as tables: for a terminal, as Markdown, as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from visft_ds.experiments.ablations.collect import LEVEL, ArmResult, Estimate, Metric, Outcome
from visft_ds.monitor.console import Section

BASE_ROW = "before stage 2"
_NONE = "–"


def sections(outcome: Outcome) -> list[Section]:
    """Tables of rows and columns: what stage 2 changed, and how the arms differ from the first."""
    found = []
    for where, inside in (("in domain", True), ("out of domain", False)):
        metrics = [metric for metric in outcome.metrics if metric.in_domain is inside]
        if not metrics:
            continue
        names = ["", *(metric.name for metric in metrics)]
        first, *others = outcome.arms
        changes = [[arm.name, *(_cell(arm.change(metric.name)) for metric in metrics)] for arm in outcome.arms]
        base = [BASE_ROW, *(_before(outcome.arms, metric) for metric in metrics)]
        found.append(Section(f"{where}: after stage 2 minus before", [base, *changes], names))
        if others:
            rows = [[arm.name, *(_cell(arm.against(first, metric.name)) for metric in metrics)] for arm in others]
            reference = [first.name, *(_mean(first, metric) for metric in metrics)]
            found.append(Section(f"{where}: after stage 2, minus that of {first.name!r}", [reference, *rows], names))
    return found


def remarks(outcome: Outcome) -> list[str]:
    """Remarks for a reader of the tables, one line each."""
    lines = [
        f"Points of 100, seeds {', '.join(map(str, outcome.seeds))}. Differences are of the same seed: their mean and "
        f"how far its {LEVEL:.0%} Student t interval over seeds reaches either way; * leaves zero out. The first row "
        "of each table is no difference."
    ]
    lines += [outcome.note] if outcome.note else []
    sure = [
        f"{arm.name} ({metric.name} {change.mean:+.1f})"
        for arm in outcome.arms
        for metric in outcome.metrics
        if not metric.in_domain and (change := arm.change(metric.name)) is not None and change.sure
    ]
    count = sum(
        arm.change(metric.name) is not None
        for arm in outcome.arms
        for metric in outcome.metrics
        if not metric.in_domain
    )
    lines.append(
        f"Out of domain {len(sure)} of {count} intervals leave zero out"
        + (f": {', '.join(sure)}. " if sure else ". ")
        + f"About {count * (1 - LEVEL):.1f} of so many would by chance alone."
    )
    return lines + [f"{arm.name} is incomplete: {cause}" for arm in outcome.arms for cause in arm.failures]


def markdown(outcome: Outcome) -> str:
    """A part of a page, with a heading of the second level."""
    lines = [f"## {outcome.name}", "", outcome.asks, ""]
    for section in sections(outcome):
        lines += [f"**{section.title}**", "", _line(section.columns), _line(["---"] * len(section.columns))]
        lines += [*map(_line, section.rows), ""]
    return "\n".join([*lines, *(f"* {line}" for line in remarks(outcome)), ""])


def as_json(outcome: Outcome) -> dict[str, Any]:
    """Everything in JSON's types, seeds as texts."""
    return {
        "question": outcome.name,
        "asks": outcome.asks,
        "note": outcome.note,
        "seeds": list(outcome.seeds),
        "level": LEVEL,
        "metrics": [asdict(metric) for metric in outcome.metrics],
        "arms": [_arm(arm, outcome.arms[0], outcome.metrics) for arm in outcome.arms],
    }


def _arm(arm: ArmResult, first: ArmResult, metrics: Sequence[Metric]) -> dict[str, Any]:
    return {
        "name": arm.name,
        "numbers": {m: {str(seed): asdict(pair) for seed, pair in of.items()} for m, of in arm.numbers.items()},
        "change": {metric.name: _estimate(arm.change(metric.name)) for metric in metrics},
        "against_first": {metric.name: _estimate(arm.against(first, metric.name)) for metric in metrics},
        "failures": list(arm.failures),
    }


def _estimate(value: Estimate | None) -> dict[str, Any] | None:
    return None if value is None else {"mean": value.mean, "low": value.low, "high": value.high}


def _before(arms: Sequence[ArmResult], metric: Metric) -> str:
    """The mean before; a range where arms begin at different bases."""
    means = [mean for arm in arms if (mean := arm.mean(metric.name, "before")) is not None]
    if not means:
        return _NONE
    low, high = min(means), max(means)
    return f"{low:.1f}" if high - low < 0.05 else f"{low:.1f} to {high:.1f}"


def _mean(arm: ArmResult, metric: Metric) -> str:
    mean = arm.mean(metric.name, "after")
    return _NONE if mean is None else f"{mean:.1f}"


def _cell(value: Estimate | None) -> str:
    if value is None:
        return _NONE
    if value.low is None or value.high is None:
        return f"{value.mean:+.1f} (one seed)"
    return f"{value.mean:+.1f} ± {(value.high - value.low) / 2:.1f}{' *' if value.sure else ''}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("*", "\\*") for cell in cells) + " |"
