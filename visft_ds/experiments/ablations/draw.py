"""Chart of a question: a panel for each metric, in it a dot with its interval for each arm, and its seeds."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence

from visft_ds.evals.charts import ticks
from visft_ds.experiments.ablations.collect import ArmResult, Metric, Outcome
from visft_ds.experiments.ablations.statistics import LEVEL, Estimate

_COLUMNS = 3
_NAMES, _PANEL, _GAP = 190, 232, 46  # widths in pixels
_ROW, _HEAD, _FOOT, _TITLE = 22, 34, 30, 58  # heights
_FONT = 'font-family="system-ui, sans-serif"'
_INK, _PALE, _LINE, _ZERO = "#25272a", "#55585c", "#e3e4e6", "#9a9da1"
_UP, _DOWN, _UNSURE = "#1d7a33", "#b3261e", "#6f7479"


def chart(outcome: Outcome) -> str:
    """An `<svg>` element: what stage 2 changed, by arm. Green and red: the interval leaves zero out."""
    groups = [
        (title, [metric for metric in outcome.metrics if metric.in_domain is inside])
        for title, inside in (("in domain", True), ("out of domain", False))
    ]
    groups = [(title, metrics) for title, metrics in groups if metrics]
    height_of_panel = _HEAD + _ROW * len(outcome.arms) + _FOOT
    rows = sum(math.ceil(len(metrics) / _COLUMNS) for _, metrics in groups)
    width = _NAMES + _COLUMNS * (_PANEL + _GAP)
    height = _TITLE + 26 * len(groups) + rows * height_of_panel + 6
    seeds = f"{len(outcome.seeds)} seeds, {LEVEL:.0%} t intervals of the mean"
    parts = [
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{html.escape(outcome.asks)}" xmlns="http://www.w3.org/2000/svg">'
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        _text(12, 22, outcome.asks, size=15, weight=600, colour=_INK),
        _text(12, 42, f"after stage 2 minus before, in points of 100; {seeds}; small dots are seeds"),
    ]
    top = _TITLE
    for title, metrics in groups:
        parts.append(_text(12, top + 16, title, size=13, weight=600, colour=_INK))
        top += 26
        for place, metric in enumerate(metrics):
            row, column = divmod(place, _COLUMNS)
            left = _NAMES + column * (_PANEL + _GAP)
            parts += _panel(outcome.arms, metric, left, top + row * height_of_panel, names=column == 0)
        top += math.ceil(len(metrics) / _COLUMNS) * height_of_panel
    return "".join([*parts, "</svg>"])


def _panel(arms: Sequence[ArmResult], metric: Metric, left: float, top: float, *, names: bool) -> list[str]:
    changes = [arm.change(metric.name) for arm in arms]
    known = [one for one in changes if one is not None]
    every = [0.0, *(value for one in known for value in (*one.values, *_ends(one)))]
    marks = ticks(min(every), max(every), 4)
    bottom = top + _HEAD + _ROW * len(arms)

    def place(value: float) -> float:
        return left + (value - marks[0]) / (marks[-1] - marks[0]) * _PANEL

    parts = [_text(left, top + 20, metric.name, colour=_INK)]
    for mark in marks:
        x, colour = place(mark), _ZERO if abs(mark) < 1e-12 else _LINE
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top + _HEAD - 4}" y2="{bottom}" stroke="{colour}"/>')
        parts.append(_text(x, bottom + 16, f"{mark:+.4g}" if mark else "0", size=11, anchor="middle"))
    for number, (arm, change) in enumerate(zip(arms, changes, strict=True)):
        y = top + _HEAD + _ROW * (number + 0.5)
        if names:
            parts.append(_text(left - 12, y + 4, arm.name, anchor="end", colour=_INK))
        if change is None:
            parts.append(_text(place(0.0) + 4, y + 4, "no result", size=11))
        else:
            parts += _dot(change, y, place)
    return parts


def _dot(change: Estimate, y: float, place: Callable[[float], float]) -> list[str]:
    colour = _UNSURE if not change.sure else _UP if change.mean > 0 else _DOWN
    low, high = _ends(change)
    parts = [
        f'<line x1="{place(low):.1f}" x2="{place(high):.1f}" y1="{y:g}" y2="{y:g}" stroke="{colour}" stroke-width="2"/>'
    ]
    for value in change.values:
        parts.append(f'<circle cx="{place(value):.1f}" cy="{y - 5:g}" r="1.8" fill="{_PALE}" opacity="0.6"/>')
    return [*parts, f'<circle cx="{place(change.mean):.1f}" cy="{y:g}" r="4.5" fill="{colour}"/>']


def _ends(change: Estimate) -> tuple[float, float]:
    """The interval; without one, the mean twice."""
    return (change.mean, change.mean) if change.low is None or change.high is None else (change.low, change.high)


def _text(
    x: float, y: float, text: str, *, size: int = 12, weight: int = 400, anchor: str = "start", colour: str = _PALE
) -> str:
    style = f'{_FONT} font-size="{size}" font-weight="{weight}" text-anchor="{anchor}" fill="{colour}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{html.escape(text)}</text>'
