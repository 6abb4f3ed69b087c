"""Pages: one HTML file each that needs no network, with images and charts in it, out of templates beside
this module.

Charts are `<svg>` elements, drawn by matplotlib: no script, nothing to load, equal bytes for equal data.
"""

from __future__ import annotations

import base64
import html
import io
import math
import shlex
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, UndefinedError
from PIL import Image

from visft_ds.evals.records import Interval, Record, number_text
from visft_ds.tasks.pictures import Picture

#: Values that differ by more than this factor are drawn on a logarithmic axis.
WIDE = 4.0
_COLOURS = ("#2c6fbb", "#c2571a", "#3c8d40", "#8a4fa3", "#b8901c", "#177f86", "#b0386c", "#6f7479")
_PALE = "#55585c"
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
    **{f"{name}.color": _PALE for name in ("text", "xtick", "ytick")},
    "axes.labelcolor": _PALE,
    "axes.edgecolor": "#9a9da1",
    "ytick.left": False,
    "figure.constrained_layout.wspace": 0.06,
    "path.simplify_threshold": 0.3,  # points of a long line that nobody would see
}


@cache
def _environment() -> Environment:
    """The templates of this folder, each parsed once."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["number"] = number_text
    environment.globals["interval"] = _interval
    return environment


def render(template: str, **values: Any) -> str:
    """The text of a page; values are escaped unless the template says that they are markup."""
    try:
        return _environment().get_template(template).render(**values)
    except (UndefinedError, TypeError) as error:
        raise ValueError(f"a record is damaged, or of another version: {error}") from error


def _interval(difference: Mapping[str, float], percent: bool = True) -> str:
    return Interval(difference["value"], difference["low"], difference["high"]).text(percent)


def embedded(picture: Picture, form: str = "jpeg") -> str:
    """A picture as a data URI; `png` for flat colours."""
    buffer = io.BytesIO()
    # No subsampling of colour: it would blur the thin coloured frames.
    options: dict[str, Any] = {"quality": 82, "subsampling": 0} if form == "jpeg" else {"optimize": True}
    Image.fromarray(picture).save(buffer, format=form, **options)
    return f"data:image/{form};base64,{base64.b64encode(buffer.getvalue()).decode()}"


@dataclass(frozen=True)
class Series:
    """Line of a chart."""

    xs: Sequence[float]
    ys: Sequence[float]
    name: str = ""  #: for the legend; empty: not in it
    behind: Sequence[float] = ()  #: other values in the same places, thin and pale behind the line


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    y_label: str,
    linear: bool = False,
    places: Sequence[str] = (),
) -> str:
    """An `<svg>` element with grid lines and a legend of the named series, over optimiser steps or named
    places.

    A series has the colour of its place among all; "" where none has a point. Unless it is to be `linear`,
    the vertical axis is logarithmic where all values are positive and the largest is more than WIDE times the
    smallest: a loss falls most in its first steps. `title` is also read out aloud.
    """
    from matplotlib import style  # takes a second
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    values = [y for curve in series for y in (*curve.ys, *curve.behind)]
    if not values:
        return ""
    text = io.StringIO()
    with style.context(["default", _STYLE]), warnings.catch_warnings():
        # Of other scripts: the reader's program has fonts.
        warnings.filterwarnings("ignore", "Glyph .* missing")
        width, height = (640, 340) if places else (360, 260)
        figure = Figure((width / 72, height / 72), layout="constrained")
        axes = figure.subplots()
        axes.set_title(title, weight="bold")
        axes.set(ylabel=y_label, xlabel="" if places else "optimiser step")
        axes.grid(axis="y")
        if places:
            step = math.ceil(len(places) / 24)  # more do not fit
            axes.set_xticks(range(len(places))[::step], places[::step], rotation=60, ha="right")
        if not linear and 0 < WIDE * min(values) < max(values):
            axes.set_yscale("log", subs=[])
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:.6g}")
        for curve, colour in zip(series, cycle(_COLOURS), strict=False):
            _draw(axes, curve, colour)
        if any(curve.name for curve in series):
            axes.legend(frameon=False)
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    element = text.getvalue().partition("<svg ")[2]  # a page has no room for the XML declaration
    return f'<svg role="img" aria-label="{html.escape(title)}" {element}'


def _draw(axes: Any, curve: Series, colour: str) -> None:
    line = "o-" if len(curve.xs) < 50 else "-"  # of a lone point nothing else is seen
    if curve.behind:
        axes.plot(curve.xs, curve.behind, line, ms=3, color=colour, lw=1, alpha=0.35)
    if curve.xs:
        axes.plot(curve.xs, curve.ys, line, ms=3, color=colour, lw=2, label=curve.name or None)


def judge_page(record: Record, sheets: Sequence[Picture]) -> str:
    """The page of `visft judge` about a record, which is what judge.json holds.

    Args:
        sheets: drawings of what models see.
    """
    base = next(iter(record["variants"]))
    (primary,) = (row for row in record["rows"] if row["name"] == record["primary"])
    layers = record["layers"].get(primary["name"], {})
    curves = {variant: chosen["held_out"] for variant, chosen in layers.items()}
    blocks = list(dict.fromkeys(block for scores in curves.values() for block in scores))
    unit, factor = ("", -1) if primary["lower"] else ("percent", 100)  # held-out errors are kept with a minus
    series = []
    for variant, scores in curves.items():
        xs = [blocks.index(block) for block in scores]
        series.append(Series(xs, [factor * score for score in scores.values()], variant))
    return render(
        "judge/judge.html.j2",
        title=f"{', '.join(trial['variant'] for trial in record['trials'])} against {base}",
        record=record,
        base=base,
        primary=primary,
        curve=line_chart(series, title=primary["name"], y_label=unit, linear=True, places=blocks),
        sheets=[embedded(sheet, "png") for sheet in sheets],
        command=shlex.join(record["command"]),
    )
