"""Charts of what runs recorded for each step, side by side, and where their time went.

A record that a run does not have (one of an earlier release, one without a GPU) is a chart less, never an error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from visft_ds.evals.charts import Series, line_chart, smooth, thin
from visft_ds.evals.compare import MAIN
from visft_ds.monitor.metrics import METRICS_FILE, read_metrics

COLOURS = ("#2c6fbb", "#c2571a", "#3c8d40", "#8a4fa3", "#b8901c", "#177f86", "#b0386c", "#6f7479")
#: Names in metrics.jsonl that not every run has -> what they are.
_OPTIONAL = {
    "val/": "evaluations",
    "images_per_second/": "speed by task",
    "memory/peak_gib": "memory",
    "mfu": "model FLOP utilisation (on GPUs whose peak is known)",
}


@dataclass(frozen=True)
class History:
    """Records of a run's metrics.jsonl."""

    steps: Sequence[Mapping[str, Any]]  #: one of each optimiser step
    others: Sequence[Mapping[str, Any]]  #: evaluations, saves, events
    damaged: int = 0  #: lines that cannot be read

    def names(self) -> set[str]:
        """Names that have numbers."""
        return {name for entry in (*self.steps, *self.others) for name in entry}

    def points(self, name: str) -> tuple[list[float], list[float]]:
        """Steps and numbers of a name."""
        found = [(entry["step"], float(entry[name])) for entry in (*self.steps, *self.others) if name in entry]
        return [step for step, _ in found], [value for _, value in found]

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
    with path.open("rb") as file:
        damaged = sum(1 for _ in file) - len(records)
    steps = [entry for entry in records if "loss/loss" in entry]
    return History(steps, [entry for entry in records if "loss/loss" not in entry], damaged)


def charts(histories: Mapping[str, History]) -> list[dict[str, Any]]:
    """Charts by kind, {"title", "charts"}; each has a line of every run that recorded its number."""
    speeds = {"": "images per second", **{f"/{task}": f"{task}: images per second" for task in MAIN}}
    kinds = {
        "Loss by task": [_chart(histories, f"loss/{task}", f"{task} loss", "weighted loss") for task in MAIN],
        "Evaluation during training": [
            _chart(histories, f"val/{name}", name, "", plain=True) for name in MAIN.values()
        ],
        "Learning rate and gradient": [
            _rates(histories),
            _chart(histories, "gradient_norm", "gradient norm", "L2 norm, before clipping"),
        ],
        "Speed and memory": [
            *(
                _chart(histories, f"images_per_second{end}", title, "images/s", linear=True)
                for end, title in speeds.items()
            ),
            _chart(histories, "mfu", "model FLOP utilisation", "share of the peak", linear=True),
            _chart(histories, "memory/peak_gib", "peak memory of the fullest device", "GiB", plain=True),
        ],
    }
    found = {title: [chart for chart in drawn if chart] for title, drawn in kinds.items()}
    return [{"title": title, "charts": drawn} for title, drawn in found.items() if drawn]


def missing(histories: Mapping[str, History]) -> list[str]:
    """Lines on what the runs' metrics.jsonl do not tell."""
    lines: dict[str, list[str]] = {}
    for label, history in histories.items():
        names = history.names()
        absent = [what for begin, what in _OPTIONAL.items() if not any(name.startswith(begin) for name in names)]
        if absent:
            lines.setdefault(f"not recorded: {', '.join(absent)}.", []).append(label)
        if history.damaged:
            lines.setdefault(f"{history.damaged} damaged lines of {METRICS_FILE} are left out.", []).append(label)
    return [f"{', '.join(labels)}: {line}" for line, labels in lines.items()]


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
            series.append(Series(*thin(xs, ys), colour, faint=True))
            ys, told = smooth(ys), told or "smoothed"
        series.append(Series(*thin(xs, ys), colour, name=told))
    return _drawn(series, title, unit, linear or plain) if series else ""


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
            series.append(Series(*thin(*history.points(group[0])), COLOURS[len(series) % len(COLOURS)], name=told))
    return _drawn(series, "learning rate", "", linear=True) if series else ""


def _drawn(series: Sequence[Series], title: str, unit: str, linear: bool) -> str:
    return line_chart(series, title=title, x_label="optimiser step", y_label=unit, linear=linear)


def time_by_part(history: History, visft: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of a run's steps by what they were spent on, and between its steps; {} where it did not record them.

    Pauses of a run that was interrupted are not counted.
    """
    timed = [entry for entry in history.steps if {"images_per_second", "data_wait_seconds", "time"} <= entry.keys()]
    lasted = [_images(entry, visft) / (float(entry["images_per_second"]) or math.nan) for entry in timed]
    waited = sum(float(entry["data_wait_seconds"]) for entry in timed)
    stalled = sum(history.points("save/stall_seconds")[1])
    between = sum(
        float(later["time"]) - float(earlier["time"]) - seconds
        for (earlier, later), seconds in zip(pairwise(timed), lasted[1:], strict=True)
        if sum(_stages(later).values()) >= sum(_stages(earlier).values())  # the same process
    )
    parts = {
        "computing": sum(lasted) - waited,
        "waiting for data": waited,
        "standing still to save": stalled,
        "evaluating, and the rest": max(0.0, between - stalled),
    }
    return parts if timed and all(map(math.isfinite, parts.values())) else {}


def time_of_data(history: History) -> dict[str, float]:
    """Seconds that the workers of the main process spent on each stage of making samples, over all starts of a run."""
    total: dict[str, float] = {}
    before: dict[str, float] = {}
    for entry in history.steps:
        now = _stages(entry)
        if sum(now.values()) < sum(before.values()):  # another process: its clocks begin at zero
            before = {}
        for name, seconds in now.items():
            total[name] = total.get(name, 0.0) + seconds - before.get(name, 0.0)
        before = now
    return {name: seconds for name, seconds in total.items() if seconds and math.isfinite(seconds)}


def _stages(entry: Mapping[str, Any]) -> dict[str, float]:
    return {name.partition("/")[2]: float(value) for name, value in entry.items() if name.startswith("data_seconds/")}


def _images(entry: Mapping[str, Any], visft: Mapping[str, Any]) -> int:
    """Images of an optimiser step."""
    if visft["mode"] == "shared":
        return int(visft["shared"]["batch_size"])
    return next((task["batch_size"] for name, task in visft["tasks"].items() if task and f"loss/{name}" in entry), 0)
