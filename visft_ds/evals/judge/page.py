"""The page of `visft judge`: one HTML file that needs no network, out of judge.json's record and a few pictures."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from visft_ds.evals.charts import COLOURS, Series, line_chart
from visft_ds.evals.pages import embedded, render
from visft_ds.evals.records import Interval
from visft_ds.tasks.pictures import Picture


def judge_page(record: Mapping[str, Any], sheets: Sequence[Picture]) -> str:
    """The page about a record, which is what judge.json holds.

    Args:
        sheets: pictures of what models see.
    """
    base = next(iter(record["arms"]))
    (primary,) = (row for row in record["rows"] if row["name"] == record["primary"])
    curves = {arm: of["held_out"] for arm, of in record["layers"].get(primary["name"], {}).items()}
    blocks = list(dict.fromkeys(block for of in curves.values() for block in of))
    series = [
        Series([blocks.index(block) for block in of], [100 * value for value in of.values()], colour, arm)
        for (arm, of), colour in zip(curves.items(), itertools.cycle(COLOURS), strict=False)
    ]
    return render(
        "judge/judge.html.j2",
        title=f"{', '.join(trial['arm'] for trial in record['trials'])} against {base}",
        record=record,
        base=base,
        primary=primary,
        number=_number,
        change=_change,
        table=table_of(record),
        curve=line_chart(series, title=primary["name"], y_label="percent", linear=True, places=blocks)
        if curves
        else "",
        sheets=[embedded(sheet, "png") for sheet in sheets],
        command=shlex.join(record["command"]),
    )


def table_of(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of a record for a page: each number of each arm, and its difference from the first one."""
    return [
        {
            "name": row["name"],
            "n": row["items"],
            "cells": [
                (_number(row, row["values"].get(arm)), _change(row, row["differences"].get(arm)))
                for arm in record["arms"]
            ],
        }
        for row in record["rows"]
    ]


def _interval(of: Mapping[str, Any]) -> Interval:
    return Interval(of["value"], of["low"], of["high"])


def _number(row: Mapping[str, Any], of: Mapping[str, Any] | None) -> str:
    """A value as text: in percent, an error in its own unit."""
    if of is None:
        return "–"
    return f"{of['value']:.3f}" if row["lower"] else f"{100 * of['value']:.2f}"


def _change(row: Mapping[str, Any], of: Mapping[str, Any] | None) -> tuple[str, str]:
    """(difference as text, class of its colour) in a cell."""
    if of is None:
        return "", ""
    shown = of.get("shown", False)
    better = (of["value"] > 0) != row["lower"]
    return _interval(of).text(shown, not row["lower"]), ("up" if better else "down") if shown else ""
