"""The page of `visft judge`: one HTML file that needs no network, out of judge.json's record and a few pictures."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from visft_ds.evals.charts import block_chart, interval_chart
from visft_ds.evals.pages import embedded, render
from visft_ds.evals.records import Interval
from visft_ds.tasks.pictures import Picture

#: End of a number's name -> how it is measured, what --quick does instead, and where that is published.
PROTOCOLS = {
    "in-context mIoU": (
        "Nothing is trained. Images are stretched to 512 pixels (504 for patches of 14). Memory holds patches of two "
        "augmented passes over the training images, at most 10,240,000. A patch takes the classes of its 30 nearest by "
        "cosine, weighted by softmax(similarity / 0.02); the result is brought to the label's size.",
        "one pass at the model's size without augmentation, at most 102,400 patches",
        "https://github.com/vpariza/open-hummingbird-eval",
    ),
    "linear mIoU": (
        "A linear layer on batch-normalised patches: 40,000 steps of 16 crops of 512 pixels, AdamW at 1e-3. The test "
        "image slides under a window of 512 by 341; it is judged at the label's size.",
        "2,000 steps on features that were computed once, at the model's size",
        "https://github.com/facebookresearch/dinov3, eval/segmentation",
    ),
    "objects kNN": ("Patches are averaged over each object; its 20 nearest training objects name it.", "", "ours"),
    "RMSE": (
        "A linear layer on batch-normalised patches gives 256 bins of depth: 38,400 steps of 16 crops, AdamW at 3e-4. "
        "Errors are in metres, on Eigen's crop, as means over images.",
        "features that were computed once, at the model's size",
        "https://github.com/facebookresearch/dinov3, eval/depth",
    ),
    "kNN": (
        "The 20 nearest class tokens by cosine, weighted by softmax(similarity / 0.07).",
        "",
        "https://github.com/facebookresearch/dinov3, eval/knn.py",
    ),
    "linear": (
        "Logistic regression on the class token and the mean patch, its strength chosen on held-out training images.",
        "",
        "https://github.com/facebookresearch/dinov2, eval/linear.py",
    ),
}


def judge_page(record: Mapping[str, Any], sheets: Sequence[Picture]) -> str:
    """The page about a record, which is what judge.json holds.

    Args:
        sheets: pictures of what models see.
    """
    rows = {row["name"]: row for row in record["rows"]}
    primary = rows.pop(record["primary"])
    base = next(iter(record["arms"]))
    changes = primary["differences"]
    bars = [(f"{arm} minus {base}", of) for arm, of in changes.items()]
    for tuned in (trial["arm"] for trial in record["trials"]):
        bars += [(f"{tuned} minus {arm}", of) for arm, of in primary["controls"][tuned].items()]
        bars += [(f"{tuned} minus {base}, last layers", primary["last"][tuned])] if tuned in primary["last"] else []
    curves = record["layers"].get(primary["name"], {})
    return render(
        "judge/judge.html.j2",
        title=f"{', '.join(trial['arm'] for trial in record['trials'])} against {base}",
        record=record,
        gains=_gains(record, primary),
        gain_chart=interval_chart(
            [(name, _interval(of), bool(of["shown"])) for name, of in bars],
            title=primary["name"],
            x_label=f"{'hundredths of its unit' if primary['lower'] else 'percentage points'}, with 95 % intervals",
        ),
        rows=table_of(record, list(rows.values())),
        curve=block_chart({arm: of["held_out"] for arm, of in curves.items()}, title=primary["name"]) if curves else "",
        chosen=[
            (number, [(arm, of["chosen"]) for arm, of in each.items()]) for number, each in record["layers"].items()
        ],
        sheets=[embedded(sheet, "png") for sheet in sheets],
        protocols=_protocols(record),
        detectable=[
            {
                "name": f"{row['name']}: {trial['arm']}",
                "n": row["items"],
                "alone": _interval(of["alone"]).text(percent=not row["lower"]),
                "whole": _interval(of).text(percent=not row["lower"]),
                "detectable": _number(row, of["detectable"]),
            }
            for row in (primary, *rows.values())
            for trial in record["trials"]
            if (of := row["differences"].get(trial["arm"]))
        ],
        command=shlex.join(record["command"]),
    )


def table_of(record: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of a record for a page: each number of each arm, and its difference from the first one."""
    return [
        {
            "name": row["name"],
            "n": row["items"],
            "cells": [(_level(row, arm), *_change(row, row["differences"].get(arm))) for arm in record["arms"]],
        }
        for row in rows
    ]


def _gains(record: Mapping[str, Any], primary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of each tuned arm, rows of the primary number: arm, feature shift, number, minus base, tuned minus it."""
    base = next(iter(record["arms"]))
    chosen = {arm: of["chosen"] for arm, of in record["layers"].get(primary["name"], {}).items()}
    found = []
    for trial in record["trials"]:
        tuned = trial["arm"]

        def line(arm: str, against: Mapping[str, Any] | None = None) -> tuple[Any, ...]:
            dose, layer = record["doses"].get(arm), chosen.get(arm)
            name = arm if layer is None else f"{arm}, {layer}"
            changes = (_change(primary, primary["differences"].get(arm)), _change(primary, against))
            return name, "" if dose is None else f"{dose:.3f}", _level(primary, arm), *changes

        beside = primary["controls"][tuned].items()
        lines = [line(base), line(tuned), *(line(arm, of) for arm, of in beside)]
        lines += [line(trial["half"])] if trial["half"] else []
        if tuned in primary["last"]:
            ends = primary["last_values"]
            lines.append((f"{base}, last layer", "", _number(primary, ends[base]["value"]), ("", ""), ("", "")))
            number, change = _number(primary, ends[tuned]["value"]), _change(primary, primary["last"][tuned])
            lines.append((f"{tuned}, last layer", "", number, change, ("", "")))
        found.append({"arm": tuned, "lines": lines})
    return found


def _protocols(record: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(number, how it was measured, source) of the numbers whose protocol is published or ours."""
    found = []
    for end, (text, quick, source) in PROTOCOLS.items():
        if any(row["name"].endswith(f" {end}") for row in record["rows"]):
            found.append((end, f"{text} Here: {quick}." if quick and record["protocol"] == "quick" else text, source))
    return found


def _interval(of: Mapping[str, Any]) -> Interval:
    return Interval(of["value"], of["low"], of["high"])


def _number(row: Mapping[str, Any], value: float) -> str:
    return f"{value:.3f}" if row["lower"] else f"{100 * value:.2f}"


def _level(row: Mapping[str, Any], arm: str) -> str:
    return _number(row, row["values"][arm]["value"]) if arm in row["values"] else "–"


def _change(row: Mapping[str, Any], of: Mapping[str, Any] | None) -> tuple[str, str]:
    """(difference as text, class of its colour) in a cell."""
    if of is None:
        return "", ""
    better = (of["value"] > 0) != row["lower"]
    text = _interval(of).text(of["shown"], percent=not row["lower"])
    return text, ("up" if better else "down") if of["shown"] else ""
