"""Line charts as SVG text: no library, no script, nothing to load, so that a page with them opens anywhere."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

#: A smoothed value looks back over about this share of the line.
WINDOW = 1 / 40
#: Values that differ by more than this factor are drawn on a logarithmic axis.
WIDE = 4.0
#: Most points of a line that are worth their bytes.
MOST_POINTS = 1000

_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 16, 34, 44  # room around the plot, pixels
_TEXT = 'font-family="system-ui, sans-serif" font-size="12" fill="#55585c"'


@dataclass(frozen=True)
class Series:
    """Line of a chart: points with finite coordinates are drawn, others leave a gap."""

    xs: Sequence[float]
    ys: Sequence[float]
    colour: str  #: as in CSS
    name: str = ""  #: for the legend; empty: not in it
    faint: bool = False  #: thin and pale, behind the others


def smooth(values: Sequence[float]) -> list[float]:
    """Exponential moving average; the first values weigh equally, so that the start is not dragged along.

    Values that are not finite stay as they are and are not averaged.
    """
    least = min(1.0, 2 / (1 + WINDOW * len(values)))
    result: list[float] = []
    average, seen = 0.0, 0
    for value in values:
        if not math.isfinite(value):
            result.append(value)
            continue
        seen += 1
        average += max(least, 1 / seen) * (value - average)
        result.append(average)
    return result


def thin(xs: Sequence[float], ys: Sequence[float]) -> tuple[list[float], list[float]]:
    """Every k-th point and the last one, so that about MOST_POINTS remain."""
    places = [*range(0, len(xs) - 1, max(1, len(xs) // MOST_POINTS)), *range(len(xs))[-1:]]
    return [xs[place] for place in places], [ys[place] for place in places]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers from below `low` to above `high`; the first and last bound the axis."""
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-290):  # a constant, or rounding of one
        margin = abs(low) * 0.1 or 1.0
        low, high = low - margin, high + margin
    raw = (high - low) / count
    unit: float = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten, from the last below `low` > 0 to the first above `high`."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps = [factor * 10.0**power for power in range(first, last + 1) for factor in (1, 2, 5)]
    start = max(place for place, value in enumerate(steps) if value <= low * (1 + 1e-9))
    stop = min(place for place, value in enumerate(steps) if value >= high * (1 - 1e-9))
    return steps[start : max(stop, start + 1) + 1]


def line_chart(
    series: Sequence[Series], *, title: str, x_label: str, y_label: str, width: int = 520, height: int = 300
) -> str:
    """An `<svg>` element with axes from round number to round number, grid lines and a legend of the named series.

    Where all values are positive and the largest is more than WIDE times the smallest, the vertical axis is
    logarithmic: a loss falls most in its first steps. A chart without any finite point says so instead of drawing axes.
    """
    points = [
        (x, y) for one in series for x, y in zip(one.xs, one.ys, strict=True) if math.isfinite(x) and math.isfinite(y)
    ]
    head = (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{html.escape(title)}" xmlns="http://www.w3.org/2000/svg">'
        f'<text x="{_LEFT}" y="20" {_TEXT} font-weight="600">{html.escape(title)}</text>'
    )
    if not points:
        return f'{head}<text x="{_LEFT}" y="{height / 2:g}" {_TEXT}>no finite values</text></svg>'
    x_ticks = ticks(min(x for x, _ in points), max(x for x, _ in points))
    low, high = min(y for _, y in points), max(y for _, y in points)
    logarithmic = low > 0 and high > WIDE * low
    y_ticks = log_ticks(low, high) if logarithmic else ticks(low, high)
    scale = math.log if logarithmic else float
    right, bottom = width - _RIGHT, height - _BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        up = (scale(y) - scale(y_ticks[0])) / (scale(y_ticks[-1]) - scale(y_ticks[0])) if math.isfinite(y) else y
        return _LEFT + across * (right - _LEFT), bottom - up * (bottom - _TOP)

    parts = [head]
    for value in y_ticks:
        _, y = place(x_ticks[0], value)
        parts.append(f'<line x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e3e4e6"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end" {_TEXT}>{value:.6g}</text>')
    for value in x_ticks:
        x, _ = place(value, y_ticks[0])
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 5}" stroke="#9a9da1"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 19}" text-anchor="middle" {_TEXT}>{value:.6g}</text>')
    parts.append(f'<line x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}" stroke="#9a9da1"/>')
    middle = (_LEFT + right) / 2
    parts.append(f'<text x="{middle:g}" y="{height - 6}" text-anchor="middle" {_TEXT}>{html.escape(x_label)}</text>')
    turned = f"translate(14 {(_TOP + bottom) / 2:g}) rotate(-90)"
    parts.append(f'<text transform="{turned}" text-anchor="middle" {_TEXT}>{html.escape(y_label)}</text>')
    for one in sorted(series, key=lambda each: not each.faint):
        style = 'stroke-width="1" opacity="0.35"' if one.faint else 'stroke-width="2"'
        for path in _paths([place(x, y) for x, y in zip(one.xs, one.ys, strict=True)]):
            parts.append(f'<path d="{path}" fill="none" stroke="{one.colour}" stroke-linejoin="round" {style}/>')
    named = [one for one in series if one.name]
    for number, one in enumerate(named):
        y = _TOP + 8 + 18 * number
        parts.append(f'<line x1="{right - 22}" x2="{right}" y1="{y}" y2="{y}" stroke="{one.colour}" stroke-width="2"/>')
        label = html.escape(one.name)
        parts.append(f'<text x="{right - 28}" y="{y + 4}" text-anchor="end" {_TEXT}>{label}</text>')
    return "".join([*parts, "</svg>"])


def _paths(points: Sequence[tuple[float, float]]) -> list[str]:
    """SVG path data of each unbroken run of finite points; a single point becomes a dot."""
    paths: list[str] = []
    run: list[tuple[float, float]] = []
    for point in [*points, (math.nan, math.nan)]:
        if math.isfinite(point[0]) and math.isfinite(point[1]):
            run.append(point)
        elif run:
            run = run if len(run) > 1 else [run[0], (run[0][0] + 1, run[0][1])]
            paths.append("M" + " L".join(f"{x:.1f} {y:.1f}" for x, y in run))
            run = []
    return paths


@dataclass(frozen=True)
class Bar:
    """A value with the interval it lies in."""

    name: str
    value: float
    low: float
    high: float


def interval_chart(bars: Sequence[Bar], *, title: str, x_label: str, width: int = 760) -> str:
    """An `<svg>` element with a horizontal bar from zero for each value, and its interval as a line.

    A bar is strong where its interval leaves zero out, pale otherwise.
    """
    row, left, right = 24, 300, width - 70
    bottom = _TOP + 8 + row * len(bars)
    marks = ticks(min(0.0, *(bar.low for bar in bars)), max(0.0, *(bar.high for bar in bars)))

    def place(value: float) -> float:
        return left + (value - marks[0]) / (marks[-1] - marks[0]) * (right - left)

    parts = [
        f'<svg viewBox="0 0 {width} {bottom + 48}" width="{width}" height="{bottom + 48}" role="img" '
        f'aria-label="{html.escape(title)}" xmlns="http://www.w3.org/2000/svg">'
        f'<text x="8" y="20" {_TEXT} font-weight="600">{html.escape(title)}</text>'
    ]
    for mark in marks:
        colour = "#9a9da1" if abs(mark) < 1e-12 else "#e3e4e6"
        parts.append(
            f'<line x1="{place(mark):.1f}" x2="{place(mark):.1f}" y1="{_TOP}" y2="{bottom}" stroke="{colour}"/>'
        )
        parts.append(f'<text x="{place(mark):.1f}" y="{bottom + 18}" text-anchor="middle" {_TEXT}>{mark:.6g}</text>')
    for number, bar in enumerate(bars):
        y = _TOP + 8 + row * number
        start, end = sorted((place(0.0), place(bar.value)))
        colour = "#1d7a33" if bar.value > 0 else "#b3261e"
        strength = 1.0 if bar.low > 0 or bar.high < 0 else 0.35
        parts.append(f'<text x="{left - 8}" y="{y + 14}" text-anchor="end" {_TEXT}>{html.escape(bar.name)}</text>')
        parts.append(
            f'<rect x="{start:.1f}" y="{y + 3}" width="{max(end - start, 0.5):.1f}" height="14" fill="{colour}" '
            f'opacity="{strength}"/>'
        )
        parts.append(
            f'<line x1="{place(bar.low):.1f}" x2="{place(bar.high):.1f}" y1="{y + 10}" y2="{y + 10}" '
            f'stroke="#25272a" stroke-width="1.5"/>'
        )
        parts.append(f'<text x="{right + 8}" y="{y + 14}" {_TEXT}>{bar.value:+.2f}</text>')
    middle = (left + right) / 2
    parts.append(f'<text x="{middle:g}" y="{bottom + 38}" text-anchor="middle" {_TEXT}>{html.escape(x_label)}</text>')
    return "".join([*parts, "</svg>"])
