"""Charts of what runs recorded for each step, side by side.

A number that a run did not record is a chart less, never an error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.ndimage import uniform_filter1d

from visft_ds.evals.charts import COLOURS, Series, line_chart
from visft_ds.evals.records import MAIN
from visft_ds.monitor.metrics import METRICS_FILE, read_metrics

#: A smoothed value is the mean over this share of the line.
WINDOW = 1 / 40


@dataclass(frozen=True)
class History:
    """Records of a run's metrics.jsonl."""

    steps: Sequence[Mapping[str, Any]]  #: one of each optimiser step
    others: Sequence[Mapping[str, Any]]  #: evaluations, saves, events

    def names(self) -> set[str]:
        """Names that have numbers."""
        return {name for entry in (*self.steps, *self.others) for name in entry}

    def points(self, name: str) -> tuple[list[float], list[float]]:
        """Steps and numbers of a name, without those that are no numbers."""
        having = [entry for entry in (*self.steps, *self.others) if math.isfinite(entry.get(name, math.nan))]
        return [entry["step"] for entry in having], [float(entry[name]) for entry in having]

    @property
    def last(self) -> int:
        """The last step recorded; 0 without any."""
        return max((entry["step"] for entry in self.steps), default=0)


def read_history(run: Path) -> History:
    """Read the records of a run: none where it has no metrics.jsonl, as when its disk was full."""
    path = run / METRICS_FILE
    if not path.is_file():
        return History((), ())
    records = list(read_metrics(path))
    steps = [entry for entry in records if "loss/loss" in entry]
    return History(steps, [entry for entry in records if "loss/loss" not in entry])


def charts(histories: Mapping[str, History]) -> list[dict[str, Any]]:
    """Charts by kind, {"title", "charts"}; each has a line of every run that recorded its number."""
    kinds = {
        "Loss by task": [_chart(histories, f"loss/{task}", f"{task} loss", "weighted loss") for task in MAIN],
        "Evaluation during training": [
            _chart(histories, f"val/{name}", name, "", plain=True) for name in MAIN.values()
        ],
        "Learning rate and gradient": [
            _rates(histories),
            _chart(histories, "grad_norm", "gradient norm", "L2 norm, before clipping"),
        ],
        "Speed and memory": [
            _chart(histories, "images_per_second", "images per second", "images/s", linear=True),
            _chart(histories, "memory/peak_gib", "peak memory of the fullest device", "GiB", plain=True),
        ],
    }
    found = {title: [chart for chart in drawn if chart] for title, drawn in kinds.items()}
    return [{"title": title, "charts": drawn} for title, drawn in found.items() if drawn]


def _chart(
    histories: Mapping[str, History], name: str, title: str, unit: str, *, linear: bool = False, plain: bool = False
) -> str:
    """A line of each run that has the number, smoothed, pale behind it as it was recorded; "" where none has.

    `plain`: as it was recorded, and linear.
    """
    series: list[Series] = []
    for number, (label, history) in enumerate(histories.items()):
        xs, ys = history.points(name)
        if not xs:
            continue
        colour, told = COLOURS[number % len(COLOURS)], label if len(histories) > 1 else ""
        if not plain:
            series.append(Series(xs, ys, colour, faint=True))
            of = np.asarray(ys)
            ys, told = uniform_filter1d(of, 1 + int(WINDOW * len(of)), mode="nearest").tolist(), told or "smoothed"
        series.append(Series(xs, ys, colour, name=told))
    return line_chart(series, title=title, y_label=unit, linear=linear or plain) if series else ""


def _rates(histories: Mapping[str, History]) -> str:
    """A line for each learning rate of each run; groups that always have the same share one."""
    series: list[Series] = []
    for label, history in histories.items():
        alike: dict[tuple[float, ...], list[str]] = {}
        for name in sorted(name for name in history.names() if name.startswith("lr/")):
            alike.setdefault(tuple(history.points(name)[1]), []).append(name)
        for group in alike.values():
            groups = ", ".join(name.removeprefix("lr/") for name in group)
            told = f"{label}: {groups}" if len(histories) > 1 else groups
            series.append(Series(*history.points(group[0]), COLOURS[len(series) % len(COLOURS)], name=told))
    return line_chart(series, title="learning rate", y_label="", linear=True) if series else ""
