"""What a comparison says of itself: a null result is called one, and losses stand beside gains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from visft_ds.evals.out_of_domain import read_comparison
from visft_ds.evals.report import Report, write_report
from visft_ds.tasks.pictures import save_png


def _row(name: str, change: float, half: float, shown: bool) -> dict[str, Any]:
    of = {"value": 0.5, "low": 0.4, "high": 0.6}
    difference = {"value": change, "low": change - half, "high": change + half}
    values = {"before": of, "after": of | {"value": 0.5 + change}}
    return {
        "name": f"dense/b {name}",
        "items": 9,
        "values": values,
        "differences": {"after": difference},
        "p": {"after": 0.5},
        "seeds": {},
        "shown": {"after": shown},
    }


def _write(folder: Path, *rows: dict[str, Any], **more: Any) -> Path:
    record = {
        "format": "visft_ds benchmarks",
        "arms": {"before": ["before"], "after": ["after"]},
        "primary": "dense/b objects knn",
        "rows": rows,
        "doses": {"after": {"dense/b": {"kind": "patches", "change": 0.25, "cosine": 0.97}}},
        "pictures": ["pictures/one.png"],
        "seconds": 1.0,
    }
    folder.mkdir(exist_ok=True)
    (folder / "benchmarks.json").write_text(json.dumps(record | more))
    save_png(np.zeros((20, 30, 3), np.uint8), folder / "pictures/one.png")
    return folder


NULL = _row("objects knn", 0.004, 0.023, False)


def test_a_null_result_is_called_one(tmp_path: Path) -> None:
    found = read_comparison(_write(tmp_path, NULL, _row("linear mIoU", -0.02, 0.01, True)))
    assert found.verdict() == "not shown: +0.40 [-1.90, +2.70]"
    assert dict(found.outcome()) == {
        "objects knn, named before the run": "not shown: +0.40 [-1.90, +2.70]",
        "gained": "nothing that is shown",
        "lost": "linear mIoU",
        "features of dense/b moved": "by 0.250 of their spread, cosine 0.9700",
    }
    assert [(line.name, line.before, line.after, line.kind) for line in found.lines()] == [
        ("objects knn", "50.00", "50.40", ""),
        ("linear mIoU", "50.00", "48.00", "down"),
    ]


def test_names_of_two_benchmarks_are_short_where_they_differ(tmp_path: Path) -> None:
    kept = _row("answers kept", -0.04, 0.01, True) | {"name": "retention/val2017 answers kept"}
    found = read_comparison(_write(tmp_path, NULL, kept))
    assert [line.name for line in found.lines()] == ["objects knn", "answers kept"]
    said = dict(found.outcome())
    assert said["lost"] == "answers kept" and said["price"].startswith("46.00 % of what the base's own classifier says")
    found = read_comparison(_write(tmp_path, NULL, NULL | {"name": "dense/c objects knn"}))
    assert [line.name for line in found.lines()] == ["dense/b objects knn", "dense/c objects knn"]


def test_the_page_begins_with_it(tmp_path: Path) -> None:
    found = read_comparison(_write(tmp_path / "a", _row("objects knn", 0.045, 0.01, True)))
    text = write_report(tmp_path / "report.html", Report("t", [], {}, [], beyond=found)).read_text(encoding="utf-8")
    assert text.count(">shown: +4.50 [+3.50, +5.50]<") == 2 and "<b>54.50</b>" in text
    assert text.index("Out of domain") < text.index("data:image/jpeg") and "+4.50 [+3.50, +5.50] *</td>" in text


def test_records_that_decide_nothing_are_refused(tmp_path: Path) -> None:
    for change, message in (
        ({"rows": [_row("linear mIoU", 0.1, 0.1, True)]}, "no difference of dense/b objects knn, which was to decide"),
        ({"primary": None}, "primary"),
        ({"arms": {"before": ["before"]}}, "arms"),
        ({"pictures": ["../one.png"]}, "pictures"),
    ):
        with pytest.raises(ValueError, match=message):
            read_comparison(_write(tmp_path, NULL, **change))
