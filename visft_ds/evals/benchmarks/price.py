"""Dose, gain and price of each arm side by side, and the knee of a sweep over the scales of an adapter.

The gain is the difference of the primary number, the price what is lost of numbers that count as one: answers of the
base's classifier that stay, zero-shot accuracy, probes of another kind. The knee is the scale at which the curve of
gain against price is furthest above the straight line from nothing at all to the largest gain at the largest price of
the sweep (Kneedle, https://doi.org/10.1109/ICDCSW.2011.20), among the scales whose gain is shown.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from visft_ds.evals.benchmarks.arms import Contender
from visft_ds.evals.benchmarks.intervals import Interval
from visft_ds.evals.benchmarks.run import Dose
from visft_ds.evals.benchmarks.table import Row, change
from visft_ds.evals.charts import Bar, Spot, price_chart
from visft_ds.evals.curves import read_history
from visft_ds.monitor.console import Section
from visft_ds.tasks import TASKS


@dataclass(frozen=True)
class Point:
    """Gain of an arm and what it costs."""

    arm: Contender
    gain: Interval
    shown: bool
    loss: Interval  #: of the prices' mean, more is worse


def price_section(
    arms: Sequence[Contender],
    doses: Mapping[str, Mapping[str, Dose]],
    gain: Row | None,
    prices: Sequence[Row],
) -> Section | None:
    """A line for each arm but the first; None where there is nothing to tell.

    Args:
        doses: model -> benchmark -> how far its features moved; told is that of the gain's benchmark, or the first one.
    """
    base, *others = arms
    lines = []
    for arm in others:
        moved = [_dose(doses[model.label], gain) for model in arm.models if model.label in doses]
        of = [[one.change for one in moved], [one.cosine for one in moved]]
        line = [f"{sum(values) / len(values):.4g}" if values else "–" for values in of]
        line += [change(row, arm.label) for row in ([gain] if gain else []) + list(prices)]
        lines.append([arm.label, *line])
    if not lines or all(set(line[1:]) == {"–"} for line in lines):
        return None
    columns = [
        "",
        "moved",
        "cosine",
        *([f"gain: {gain.name}"] if gain else []),
        *(f"price: {row.name}" for row in prices),
    ]
    return Section(
        f"how far features moved from those of {base.label} (share of their spread), gain, price", lines, columns
    )


def losses_section(arms: Sequence[Contender]) -> Section | None:
    """A line for each loss that runs of stage 2 trained: mean of its first and last tenth. None without such a run."""
    lines = []
    for run in dict.fromkeys(model.trained for arm in arms for model in arm.models if model.trained):
        history = read_history(run)
        for task in TASKS:
            _, values = history.points(f"loss/{task}")
            tenth = max(1, len(values) // 10)
            ends = [f"{sum(part) / tenth:.4g}" for part in (values[:tenth], values[-tenth:])]
            lines += [[str(run), task, *ends]] if values else []
    title = "trained losses, which judge nothing"
    return Section(title, lines, ["run of stage 2", "task", "first tenth", "last tenth"]) if lines else None


def _dose(of: Mapping[str, Dose], gain: Row | None) -> Dose:
    named = [one for label, one in of.items() if gain is not None and gain.name.startswith(f"{label} ")]
    return [*named, *of.values()][0]


def points_of(arms: Sequence[Contender], gain: Row, price: Row) -> list[Point]:
    """The arms that have both numbers."""
    found = []
    for arm in arms:
        if arm.label in gain.differences and arm.label in price.differences:
            lost, change_of = price.differences[arm.label], gain.differences[arm.label]
            shown = gain.shown.get(arm.label, change_of.sure)
            found.append(Point(arm, change_of, shown, Interval(-lost.value, -lost.high, -lost.low)))
    return found


def knees(points: Sequence[Point]) -> dict[str, Point | None]:
    """Sweep -> its knee; None where no scale has a gain that is shown."""
    found: dict[str, Point | None] = {}
    for sweep in dict.fromkeys(point.arm.sweep for point in points if point.arm.sweep is not None):
        of = [point for point in points if point.arm.sweep == sweep]
        most, dearest = (max(of_all) for of_all in zip(*((p.gain.value, p.loss.value) for p in of), strict=True))

        def height(point: Point, most: float = most, dearest: float = dearest) -> float:
            return point.gain.value / most - (max(point.loss.value, 0.0) / dearest if dearest > 0 else 0.0)

        shown = [point for point in of if point.shown and point.gain.value > 0]
        found[sweep] = max(shown, key=height) if shown else None
    return found


def knee_lines(found: Mapping[str, Point | None]) -> list[tuple[str, str]]:
    """Lines for the console: (sweep, its knee and the command that merges it)."""
    lines = []
    for sweep, point in found.items():
        if point is None:
            lines.append((sweep, "no knee: the gain is not shown at any scale"))
            continue
        model, several = point.arm.models[0], len(point.arm.models) > 1
        words = ["visft", "merge", "--base", model.name, "--adapter", str(model.adapter)]
        words += ["--scale", f"{point.arm.scale:g}", "--out", "merged.safetensors"]
        lines.append((sweep, f"@{point.arm.scale:g}: gain {point.gain.text()}, price {point.loss.text()}"))
        lines.append((f"merge {model.label}" if several else "merge", shlex.join(words)))
    return lines


def _percent(of: Interval) -> Bar:
    return Bar("", 100 * of.value, 100 * of.low, 100 * of.high)


def price_picture(points: Sequence[Point], found: Mapping[str, Point | None], gain: Row, price: Row) -> str:
    """The curves of gain against price; arms that are of no sweep are single points."""
    curves: dict[str, list[Spot]] = {}
    for point in points:
        name = point.arm.label if point.arm.sweep is None else f"@{point.arm.scale:g}"
        spot = Spot(name, _percent(point.loss), _percent(point.gain), point in found.values())
        curves.setdefault(point.arm.sweep or point.arm.label, []).append(spot)
    return price_chart(
        curves,
        title="gain against price, in percentage points with 95% intervals",
        x_label=f"lost: {price.name}",
        y_label=f"gained: {gain.name}",
    )
