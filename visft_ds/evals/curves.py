"""Charts of what runs recorded for each step, side by side.

A number that a run did not record is a chart less, never an error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy.ndimage import uniform_filter1d

from visft_ds.evals.pages import Series, line_chart
from visft_ds.evals.records import MAIN
from visft_ds.monitor.metrics import METRICS_FILE, read_metrics

#: A smoothed value is the mean over this share of the line.
WINDOW = 1 / 40
History = Sequence[Mapping[str, Any]]  #: records of a run's metrics.jsonl: steps, evaluations, events


def read_history(run: Path) -> History:
    """Read the records of a run: none where it has no metrics.jsonl, as when its disk was full."""
    path = run / METRICS_FILE
    return list(read_metrics(path)) if path.is_file() else []


def last_step(history: History) -> int:
    """The last optimiser step that was recorded; 0 without any."""
    return max((entry["step"] for entry in history if "loss/loss" in entry), default=0)


def charts(histories: Mapping[str, History]) -> list[dict[str, Any]]:
    """Charts by kind, {"title", "charts"}; each has a line of every run that recorded its number."""
    kinds = {
        "Loss by task": [_smoothed(histories, f"loss/{task}", f"{task} loss", "weighted loss") for task in MAIN],
        "Evaluation during training": [_plain(histories, f"val/{name}", name, "") for name in MAIN.values()],
        "Learning rate and gradient": [
            _rates(histories),
            _smoothed(histories, "grad_norm", "gradient norm", "L2 norm, before clipping"),
        ],
        "Speed and memory": [
            _smoothed(histories, "images_per_second", "images per second", "images/s", linear=True),
            _plain(histories, "memory/peak_gib", "peak memory of the fullest device", "GiB"),
        ],
    }
    found = {title: [chart for chart in drawn if chart] for title, drawn in kinds.items()}
    return [{"title": title, "charts": drawn} for title, drawn in found.items() if drawn]


def _points(history: History, name: str) -> tuple[list[float], list[float]]:
    """Steps and numbers of a name, without those that are no numbers."""
    having = [entry for entry in history if math.isfinite(entry.get(name, math.nan))]
    return [entry["step"] for entry in having], [float(entry[name]) for entry in having]


def _plain(histories: Mapping[str, History], name: str, title: str, unit: str) -> str:
    """A line of each run, as it was recorded."""
    several = len(histories) > 1
    series = [Series(*_points(history, name), label if several else "") for label, history in histories.items()]
    return line_chart(series, title=title, y_label=unit, linear=True)


def _smoothed(histories: Mapping[str, History], name: str, title: str, unit: str, *, linear: bool = False) -> str:
    """A smoothed line of each run, pale behind it as it was recorded."""
    series: list[Series] = []
    for label, history in histories.items():
        steps, values = _points(history, name)
        mean = uniform_filter1d(values, 1 + int(WINDOW * len(values)), mode="nearest").tolist() if values else []
        series.append(Series(steps, mean, label if len(histories) > 1 else "smoothed", behind=values))
    return line_chart(series, title=title, y_label=unit, linear=linear)


def _rates(histories: Mapping[str, History]) -> str:
    """A line for each learning rate of each run; groups that always have the same share one."""
    series: list[Series] = []
    for label, history in histories.items():
        alike: dict[tuple[float, ...], list[str]] = {}
        for name in sorted({name for entry in history for name in entry if name.startswith("lr/")}):
            alike.setdefault(tuple(_points(history, name)[1]), []).append(name)
        for group in alike.values():
            groups = ", ".join(name.removeprefix("lr/") for name in group)
            told = f"{label}: {groups}" if len(histories) > 1 else groups
            series.append(Series(*_points(history, group[0]), told))
    return line_chart(series, title="learning rate", y_label="", linear=True)
