"""Results of an experiment: one table of all variants, and whether the claim holds."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from visft_ds.experiments.variants import FIRST, PERMUTED
from visft_ds.monitor.console import Section, print_plan

BASE = "base"
IN_CONTEXT = "in-context mIoU"  #: that drawn styles are judged by
EQUAL = "at equal feature shift"  #: end of the name of a variant that is a control of the first one
MINUS_BASE = f"minus {BASE}"
FIRST_MINUS_IT = f"{FIRST} minus it"
CLAIM_SEEDS = 5  #: that the claim asks for

Record = Mapping[str, Any]  #: content of a `judge.json`
Row = dict[str, Any]  #: column -> cell of a variant
Interval = Mapping[str, float]  #: {"value", "low", "high"} of a difference, in shares of 1


def report(
    out: Path, comparisons: Sequence[Path], styles: Path | None, failed: Mapping[str, str], seeds: int
) -> None:
    """Print the verdict and the table of all variants; write them as `table.json`.

    Args:
        comparisons: folders of `visft judge`; of a variant that is in several of them the first one counts.
        styles: folder of the comparison over drawn styles, if one was asked for.
        failed: name -> reason of the steps that have no result.
    """
    from visft_ds.evals.records import read_judged  # takes a second, which --help would, too

    content: dict[str, Any] = {}
    rows: dict[str, Row] = {}
    for record in [read_judged(folder) for folder in comparisons if folder.name not in failed]:
        content["primary"] = record["primary"]
        for row in variant_rows(record):
            rows.setdefault(row["variant"], row)
    content["verdict"] = verdict(rows, seeds)
    content["rows"] = list(rows.values())
    content["failed"] = failed
    sections = [Section("verdict", [(content["verdict"],)]), _table(content["rows"])]
    if styles is not None and styles.name not in failed:
        judged = read_judged(styles)["rows"]
        content["styles"] = over_styles(judged)
        means = [(f"{FIRST} {name}", _cell(mean)) for name, mean in content["styles"].items()]
        title = f"{IN_CONTEXT}, mean over {len(judged)} drawn styles, Student's t"
        sections.append(Section(title, means))
    print_plan(content.get("primary", "visft ablate"), sections)
    (out / "table.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _table(rows: Sequence[Row]) -> Section:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    return Section("percentage points, over items and seeds together; * excludes zero", cells, columns)


def variant_rows(record: Record) -> Iterator[Row]:
    """For each variant of a comparison but the base: its feature shift, its gain in the primary number, and
    the agreement of its predictions. Of a control of the first variant also what the first one has more."""
    columns = {record["primary"]: (MINUS_BASE, FIRST_MINUS_IT)}
    for number in record["rows"]:
        name = number["name"]
        if name.startswith("agreement/"):
            columns[name] = (name, f"{FIRST_MINUS_IT}, {name}")
    for variant in list(record["variants"])[1:]:
        row = {"variant": variant, "feature shift": round(record["shifts"][variant], 3)}
        for number in record["rows"]:
            if number["name"] not in columns:
                continue
            over_base, first_over_variant = columns[number["name"]]
            row[over_base] = number["differences"].get(variant)
            controls_of_first = number["controls"].get(FIRST, {})
            if variant in controls_of_first:
                row[first_over_variant] = controls_of_first[variant]
        yield row


def over_styles(rows: Sequence[Record]) -> dict[str, Interval]:
    """The first variant's mean difference from the base and from each control, by name; one value of a style.

    Intervals are Student's t over the styles, of which there are at least two: images and seeds are part of
    each value.
    """
    values: dict[str, list[float]] = {}
    for row in rows:
        differences = {BASE: row["differences"][FIRST], **row["controls"][FIRST]}
        for name, difference in differences.items():
            values.setdefault(f"minus {name}", []).append(difference["value"])
    return {name: _mean(sample) for name, sample in values.items()}


def _mean(sample: Sequence[float]) -> Interval:
    """Mean of a sample and its 95 % interval by Student's t."""
    from scipy.special import stdtrit

    mean = fmean(sample)
    quantile = float(stdtrit(len(sample) - 1, 0.975))
    half_width = quantile * stdev(sample) / len(sample) ** 0.5
    return {"value": mean, "low": mean - half_width, "high": mean + half_width}


def verdict(rows: Mapping[str, Row], seeds: int) -> str:
    """Sentence on whether the claim holds, by the rows of the variants."""
    gain = rows.get(FIRST, {}).get(MINUS_BASE)
    over_control = rows.get(f"{PERMUTED} {EQUAL}", {}).get(FIRST_MINUS_IT)
    if gain is None or over_control is None:
        return (
            f"The claim was not judged: it needs {FIRST!r} and {PERMUTED!r}, and one of them has no result."
        )
    compared = {"the base": gain, "labels of other images": over_control}
    not_shown = [name for name, difference in compared.items() if difference["low"] <= 0]
    sentence = (
        f"The claim {'does not hold' if not_shown else 'holds'}: {_cell(gain)} over the base, "
        f"{_cell(over_control)} over labels of other images {EQUAL}."
    )
    if not_shown:
        sentence += f" Zero is not excluded over {' and '.join(not_shown)}."
    if seeds < CLAIM_SEEDS:
        sentence += f" {seeds} seeds of the {CLAIM_SEEDS} that it asks for."
    return sentence


def _cell(value: Any) -> str:
    """A cell of the table: a difference in percentage points, with a star if its interval excludes zero."""
    if value is None:
        return "–"
    if not isinstance(value, Mapping):
        return str(value)
    mean, low, high = (100 * value[name] for name in ("value", "low", "high"))
    star = " *" if low > 0 or high < 0 else ""
    return f"{mean:+z.1f} [{low:+z.1f}, {high:+z.1f}]{star}"
