"""Files for people in a folder of comparisons: tables and a chart of each question, one page over all of them."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, StringConstraints

from visft_ds.config.fields import StrictModel
from visft_ds.config.records import Finite, Whole, read_record
from visft_ds.evals.page import render
from visft_ds.experiments.ablations.collect import ArmResult, Metric, Outcome, Pair
from visft_ds.experiments.ablations.draw import chart
from visft_ds.experiments.ablations.tables import as_json, markdown, remarks, sections
from visft_ds.interop.writing import write_text
from visft_ds.monitor.console import Section, print_plan

TABLE, CHART, PAGE, MARKDOWN = "table", "chart.svg", "report.html", "report.md"


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
    return [*sections(outcome), Section("how to read it", [(line,) for line in remarks(outcome)])]


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
    return Outcome(record.question, record.asks, record.note, tuple(record.seeds), record.metrics, arms)


def _summary(outcomes: Sequence[Outcome]) -> str:
    arms = sum(len(outcome.arms) for outcome in outcomes)
    failed = sum(bool(arm.failures) for outcome in outcomes for arm in outcome.arms)
    return f"{len(outcomes)} questions, {arms} arms" + (f", {failed} of them incomplete" if failed else "")
