"""The page of `visft judge`: one HTML file that needs no network, out of judge.json's record and a few pictures."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from visft_ds.evals.pages import Series, embedded, line_chart, render
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
    unit, factor = ("", -1) if primary["lower"] else ("percent", 100)  # held-out errors are kept with a minus
    series = [
        Series([blocks.index(block) for block in of], [factor * value for value in of.values()], arm)
        for arm, of in curves.items()
    ]
    return render(
        "judge/judge.html.j2",
        title=f"{', '.join(trial['arm'] for trial in record['trials'])} against {base}",
        record=record,
        base=base,
        primary=primary,
        curve=line_chart(series, title=primary["name"], y_label=unit, linear=True, places=blocks),
        sheets=[embedded(sheet, "png") for sheet in sheets],
        command=shlex.join(record["command"]),
    )
