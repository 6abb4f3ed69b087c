"""Files for people in a folder of comparisons: tables and a chart of each question, one page over all of them.

The numbers of a question are tables for a terminal, as Markdown and as JSON, which is read again for the page.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import ConfigDict, Field, StringConstraints

from visft_ds.config.fields import StrictModel
from visft_ds.config.records import Finite, Whole, read_record
from visft_ds.evals.charts import DOWN, INK, PALE, UP, svg
from visft_ds.evals.page import render
from visft_ds.experiments.ablations.collect import LEVEL, ArmResult, Estimate, Metric, Outcome, Pair
from visft_ds.interop.writing import write_text
from visft_ds.monitor.console import Section, print_plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TABLE, CHART, PAGE, MARKDOWN = "table", "chart.svg", "report.html", "report.md"
BASE_ROW = "before stage 2"
_NONE = "–"
_COLUMNS = 3
_LISTED = 12  # intervals that are named in a remark
_WIDTH, _ROW, _FRAME = 1000, 20, 62  # of the chart, an arm, and around the arms of a panel, points


class ArmEntry(StrictModel):
    """Arm in the table of a question; what follows from its numbers stands beside them."""

    model_config = ConfigDict(extra="allow")

    name: str
    numbers: dict[
        str, dict[Annotated[str, StringConstraints(pattern=r"^\d{1,18}$")], Pair]
    ]  #: metric -> seed -> numbers
    failures: list[str]


class OutcomeFile(StrictModel):
    """Content of the table of a question."""

    question: str
    asks: str
    note: str
    seeds: list[Whole]
    level: Finite = 0.95
    said: list[str] = Field(default_factory=list)
    tables: list[Section] = Field(default_factory=list)
    metrics: list[Metric]
    arms: list[ArmEntry]


def write_question(root: Path, outcome: Outcome) -> list[Path]:
    """Write table.txt, .md, .json and chart.svg of a question; returns their paths."""
    folder = root / outcome.name
    text = io.StringIO()
    print_plan(outcome.asks, shown(outcome), stream=text)
    content = {
        f"{TABLE}.txt": text.getvalue(),
        f"{TABLE}.md": markdown(outcome),
        f"{TABLE}.json": json.dumps(as_json(outcome), indent=1) + "\n",
        CHART: chart(outcome),
    }
    for name, what in content.items():
        write_text(folder / name, what, overwrite=True)
    return [folder / name for name in content]


def shown(outcome: Outcome) -> list[Section]:
    """All of a question for a terminal."""
    said = [Section("verdict", [(line,) for line in outcome.said])] if outcome.said else []
    return [*said, *sections(outcome), Section("how to read it", [(line,) for line in remarks(outcome)])]


def write_report(root: Path, names: Sequence[str]) -> list[Path]:
    """Write a page over all questions that have been run in this folder, in the order of `names`."""
    outcomes = [read_outcome(root / name) for name in names if (root / name / f"{TABLE}.json").is_file()]
    parts = [
        {"outcome": each, "chart": chart(each), "tables": sections(each), "remarks": remarks(each)} for each in outcomes
    ]
    page = render("experiments/ablations/report.html.j2", title="Ablations", summary=_summary(outcomes), parts=parts)
    write_text(root / PAGE, page, overwrite=True)
    text = "\n".join(["# Ablations", "", _summary(outcomes), "", *map(markdown, outcomes)])
    write_text(root / MARKDOWN, text, overwrite=True)
    return [root / PAGE, root / MARKDOWN]


def read_outcome(folder: Path) -> Outcome:
    """Read what `write_question` wrote into a folder. Raises ValueError for another file."""
    record = read_record(folder / f"{TABLE}.json", OutcomeFile)
    arms = [
        ArmResult(
            arm.name,
            {metric: {int(seed): pair for seed, pair in of.items()} for metric, of in arm.numbers.items()},
            tuple(arm.failures),
        )
        for arm in record.arms
    ]
    seeds = tuple(record.seeds)
    shown = tuple(record.said), tuple(record.tables)
    return Outcome(record.question, record.asks, record.note, seeds, record.metrics, arms, *shown)


def _summary(outcomes: Sequence[Outcome]) -> str:
    arms = sum(len(outcome.arms) for outcome in outcomes)
    failed = sum(bool(arm.failures) for outcome in outcomes for arm in outcome.arms)
    return f"questions: {len(outcomes)}, arms: {arms}" + (f", {failed} of them incomplete" if failed else "")


# ------------------------------------------------------------------------------------------------------ tables


def sections(outcome: Outcome) -> list[Section]:
    """Tables of rows and columns: what stage 2 changed, and how the arms differ from the first."""
    found = list(outcome.tables)
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
        + (f": {', '.join(sure[:_LISTED])}{', ...' * (len(sure) > _LISTED)}. " if sure else ". ")
        + f"About {count * (1 - LEVEL):.1f} of so many would by chance alone."
    )
    return lines + [f"{arm.name} is incomplete: {cause}" for arm in outcome.arms for cause in arm.failures]


def markdown(outcome: Outcome) -> str:
    """A part of a page, with a heading of the second level."""
    lines = [
        f"## {outcome.name}",
        "",
        outcome.asks,
        "",
        *(part for line in outcome.said for part in (f"**{line}**", "")),
    ]
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
        "said": list(outcome.said),
        "tables": [asdict(table) for table in outcome.tables],
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


# --------------------------------------------------------------------------------------------------------------- chart


def chart(outcome: Outcome) -> str:
    """An `<svg>` element: what stage 2 changed, by arm: a panel for each metric, in it a dot with its interval for each
    arm, and its seeds. Green and red: the interval leaves zero out. A row of panels has the arms that it is about.
    """
    sides = [[metric for metric in outcome.metrics if metric.in_domain is inside] for inside in (True, False)]
    groups = [
        (title, [side[place : place + _COLUMNS] for place in range(0, len(side), _COLUMNS)])
        for title, side in zip(("in domain", "out of domain"), sides, strict=True)
        if side
    ]
    arms = [[_asked(outcome.arms, line) for line in lines] for _, lines in groups]
    heights = [[_FRAME + _ROW * len(of_line) for of_line in of_lines] for of_lines in arms]
    seeds = f"{len(outcome.seeds)} seeds, {LEVEL:.0%} t intervals of the mean"

    def draw(figure: Figure) -> None:
        title = f"{outcome.asks}\nafter stage 2 minus before, in points of 100; {seeds}; small dots are seeds"
        figure.suptitle(title, x=0.01, ha="left", color=INK, size=10)
        if not groups:
            return
        parts = figure.subfigures(len(groups), height_ratios=list(map(sum, heights)), squeeze=False)[:, 0]
        for part, of_lines, ratios, (title, lines) in zip(parts, arms, heights, groups, strict=True):
            part.suptitle(title, x=0.01, ha="left", weight="bold", color=INK, size=10)
            panels = part.subplots(len(lines), _COLUMNS, sharey="row", squeeze=False, height_ratios=ratios)
            for row, of_line, line in zip(panels, of_lines, lines, strict=True):
                for axes, metric in zip_longest(row, line):
                    axes.set_visible(metric is not None)
                    if metric is not None:
                        _panel(axes, of_line, metric)

    height = 44 + 24 * len(groups) + sum(map(sum, heights))
    return svg(draw, title=outcome.asks, width=_WIDTH, height=height)


def _asked(arms: Sequence[ArmResult], metrics: Sequence[Metric]) -> list[ArmResult]:
    """The arms that have, or failed to have, one of these numbers."""
    return [arm for arm in arms if arm.failures or any(arm.change(metric.name) for metric in metrics)]


def _panel(axes: Axes, arms: Sequence[ArmResult], metric: Metric) -> None:
    axes.set_title(metric.name, color=INK)
    axes.grid(axis="x")
    axes.axvline(0, color="#9a9da1", lw=1)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:+.4g}" if value else "0")
    axes.set_yticks(range(len(arms)), [arm.name for arm in arms], color=INK)
    axes.set_ylim(len(arms) - 0.5, -0.6)
    for row, arm in enumerate(arms):
        change = arm.change(metric.name)
        if change is None:
            if arm.failures:  # else it was not asked
                axes.text(0, row, " no result", va="center")
            continue
        colour = "#6f7479" if not change.sure else UP if change.mean > 0 else DOWN
        if change.low is not None and change.high is not None:
            axes.plot((change.low, change.high), (row, row), color=colour, lw=2)
        axes.plot(change.mean, row, "o", color=colour, markersize=6)
        axes.plot(change.values, [row - 0.25] * len(change.values), "o", color=PALE, markersize=2, alpha=0.6)
