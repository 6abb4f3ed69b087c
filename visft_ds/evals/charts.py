"""Charts as `<svg>` elements, drawn by matplotlib: no script, nothing to load, equal bytes for equal data."""

from __future__ import annotations

import html
import io
import itertools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from visft_ds.evals.records import Interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: A smoothed value looks back over about this share of the line.
WINDOW = 1 / 40
#: Values that differ by more than this factor are drawn on a logarithmic axis.
WIDE = 4.0

INK, PALE, UP, DOWN = "#25272a", "#55585c", "#1d7a33", "#b3261e"
_CURVES = (UP, "#2456a6", "#b06a00", "#7a3e9d")
#: What matplotlib's own style is changed by; a matplotlibrc of the user counts for nothing.
_STYLE = {
    "svg.hashsalt": "visft_ds",  # ids are random without it
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # names may hold a $
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib
    "font.size": 9.0,
    "axes.titlesize": 9.0,
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "grid.color": "#e3e4e6",
    **{f"axes.spines.{side}": False for side in ("left", "top", "right")},
    **{f"{name}.color": PALE for name in ("text", "xtick", "ytick")},
    "axes.labelcolor": PALE,
    "axes.edgecolor": "#9a9da1",
    "ytick.left": False,
    "figure.constrained_layout.wspace": 0.06,
    "path.simplify_threshold": 0.3,  # points of a long line that nobody would see
}


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


def svg(draw: Callable[[Figure], object], *, title: str, width: float, height: float) -> str:
    """An `<svg>` element of width x height points with what `draw` puts into a figure; `title` is read out aloud."""
    from matplotlib import style  # takes a second
    from matplotlib.figure import Figure

    text = io.StringIO()
    with style.context(["default", _STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # of other scripts: the reader's program has fonts
        figure = Figure((width / 72, height / 72), layout="constrained")
        draw(figure)
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    element = text.getvalue().partition("<svg ")[2]  # a page has no room for the XML declaration
    return f'<svg role="img" aria-label="{html.escape(title)}" {element}'


def line_chart(series: Sequence[Series], *, title: str, y_label: str, linear: bool = False) -> str:
    """An `<svg>` element over optimiser steps with grid lines and a legend of the named series.

    Unless it is to be `linear`, the vertical axis is logarithmic where all values are positive and the largest is more
    than WIDE times the smallest: a loss falls most in its first steps. A chart without any finite point says so.
    """
    values = [
        y for curve in series for x, y in zip(curve.xs, curve.ys, strict=True) if math.isfinite(x) and math.isfinite(y)
    ]

    def draw(figure: Figure) -> None:
        from matplotlib.ticker import LogLocator

        axes = figure.subplots()
        axes.set_title(title, weight="bold")
        axes.set(xlabel="optimiser step", ylabel=y_label)
        axes.grid(axis="y")
        if not values:
            axes.text(0.5, 0.5, "no finite values", transform=axes.transAxes, ha="center")
            axes.set(xticks=[], yticks=[])
        elif not linear and 0 < WIDE * min(values) < max(values):
            axes.set_yscale("log", subs=[])
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:.6g}")
        for curve in series:
            ys = np.where(np.isfinite(curve.ys), curve.ys, np.nan)
            gaps = np.pad(np.isnan(ys), 1, constant_values=True)
            width, strength = (1, 0.35) if curve.faint else (2, 1)
            (line,) = axes.plot(curve.xs, ys, color=curve.colour, lw=width, alpha=strength, label=curve.name or "_")
            line.set(marker="o", markersize=width, markevery=~gaps[1:-1] & gaps[:-2] & gaps[2:])  # of a lone point
        if any(curve.name for curve in series):
            axes.legend(frameon=False)

    return svg(draw, title=title, width=360, height=260)


def interval_chart(bars: Sequence[tuple[str, Interval, bool]], *, title: str, x_label: str) -> str:
    """An `<svg>` element with a horizontal bar from zero for each (name, value, shown), in percent, and its interval
    as a line; one that is shown is strong, others are pale.
    """

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.set_title(title, weight="bold")
        axes.grid(axis="x")
        axes.set(xlabel=x_label, ylim=(len(bars) - 0.4, -0.6))
        axes.axvline(0, color="#9a9da1", lw=1)
        axes.set_yticks(range(len(bars)), [name for name, _, _ in bars])
        for row, (_, of, shown) in enumerate(bars):
            value, low, high = 100 * of.value, 100 * of.low, 100 * of.high
            axes.barh(row, value, 0.6, color=UP if value > 0 else DOWN, alpha=1.0 if shown else 0.35)
            axes.plot((low, high), (row, row), color=INK, lw=1.5)
            axes.text(1.01, row, f"{value:+.2f}", transform=axes.get_yaxis_transform(), va="center")

    return svg(draw, title=title, width=760, height=66 + 20 * len(bars))


def block_chart(curves: Mapping[str, Mapping[str, float]], *, title: str) -> str:
    """An `<svg>` element with a curve over blocks (name -> block -> number) for each name, in percent."""
    blocks = list(dict.fromkeys(block for of in curves.values() for block in of))

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.set_title(title, weight="bold")
        axes.set(ylabel="percent")
        axes.grid(axis="y")
        step = -(-len(blocks) // 24)  # more do not fit
        axes.set_xticks(range(len(blocks))[::step], blocks[::step], rotation=60, ha="right")
        for (name, of), colour in zip(curves.items(), itertools.cycle(_CURVES), strict=False):
            places, values = [blocks.index(block) for block in of], [100 * value for value in of.values()]
            axes.plot(places, values, "o-", color=colour, ms=3, label=name)
        axes.legend(frameon=False)

    return svg(draw, title=title, width=640, height=340)
