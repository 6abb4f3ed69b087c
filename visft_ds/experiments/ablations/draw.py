"""Chart of a question: a panel for each metric, in it a dot with its interval for each arm, and its seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING

from visft_ds.evals.charts import DOWN, INK, PALE, UP, svg
from visft_ds.experiments.ablations.collect import LEVEL, ArmResult, Metric, Outcome

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS = 3
_WIDTH, _ROW, _FRAME = 1000, 20, 62  # of the chart, an arm, and around the arms of a panel, points


def chart(outcome: Outcome) -> str:
    """An `<svg>` element: what stage 2 changed, by arm. Green and red: the interval leaves zero out."""
    sides = [[metric for metric in outcome.metrics if metric.in_domain is inside] for inside in (True, False)]
    groups = [(title, side) for title, side in zip(("in domain", "out of domain"), sides, strict=True) if side]
    rows = [math.ceil(len(metrics) / _COLUMNS) for _, metrics in groups]
    seeds = f"{len(outcome.seeds)} seeds, {LEVEL:.0%} t intervals of the mean"

    def draw(figure: Figure) -> None:
        title = f"{outcome.asks}\nafter stage 2 minus before, in points of 100; {seeds}; small dots are seeds"
        figure.suptitle(title, x=0.01, ha="left", color=INK, size=10)
        if not groups:
            return
        parts = figure.subfigures(len(groups), height_ratios=rows, squeeze=False)[:, 0]
        for part, count, (title, metrics) in zip(parts, rows, groups, strict=True):
            part.suptitle(title, x=0.01, ha="left", weight="bold", color=INK, size=10)
            panels = part.subplots(count, _COLUMNS, sharey=True, squeeze=False).flat
            for axes, metric in zip_longest(panels, metrics):
                axes.set_visible(metric is not None)
                if metric is not None:
                    _panel(axes, outcome.arms, metric)

    height = 44 + 24 * len(groups) + sum(rows) * (_FRAME + _ROW * len(outcome.arms))
    return svg(draw, title=outcome.asks, width=_WIDTH, height=height)


def _panel(axes: Axes, arms: Sequence[ArmResult], metric: Metric) -> None:
    axes.set_title(metric.name, color=INK)
    axes.grid(axis="x")
    axes.axvline(0, color="#9a9da1", lw=1)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:+.4g}" if value else "0")
    axes.set_yticks(range(len(arms)), [arm.name for arm in arms], color=INK)
    axes.set_ylim(len(arms) - 0.5, -0.6)
    for row, arm in enumerate(arms):
        change = arm.change(metric.name)
        if change is None:
            axes.text(0, row, " no result", va="center")
            continue
        colour = "#6f7479" if not change.sure else UP if change.mean > 0 else DOWN
        if change.low is not None and change.high is not None:
            axes.plot((change.low, change.high), (row, row), color=colour, lw=2)
        axes.plot(change.mean, row, "o", color=colour, markersize=6)
        axes.plot(change.values, [row - 0.25] * len(change.values), "o", color=PALE, markersize=2, alpha=0.6)
