"""The one table of a comparison: each number of each model, and what changed against the first model; and sheets of
single images on which models disagree, or one is wrong.

Differences are taken item by item before they are resampled: two models that fail on the same images differ surely by
little, even where each of their numbers alone is unsure.

Intervals are bootstrap ones of a mean (Efron, https://doi.org/10.1214/aos/1176344552). Drawing n items with replacement
decides only how often each value comes; so the counts of the distinct values are drawn (multinomial), which is the same
distribution and costs the same for ten items and for a million. (scipy.stats.bootstrap draws item by item, forty times
as long for 50,000 shares, and knows no groups of items.)
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from visft_ds.evals.benchmarks.protocol import Benchmark, FloatArray, IntArray, Score, mean_ratio
from visft_ds.monitor.console import Section
from visft_ds.tasks.pictures import INK, Colour, Picture, grid, letters, paper, scaled

DRAWS = 4000
LEVEL = 0.95
_CELLS = 4_000_000  # counts in memory at once
_SIDE, _SIZE, _LINE = 220, 13, 18  # of an image; of letters and lines of text, pixels
_RIGHT, _WRONG = (29, 122, 51), (179, 38, 30)
_COLUMNS = 4

Results = Mapping[str, Mapping[str, Score]]  #: model -> name -> score


@dataclass(frozen=True)
class Interval:
    """A mean with its bootstrap interval of LEVEL, by percentiles."""

    value: float
    low: float
    high: float

    @property
    def sure(self) -> bool:
        """Return True if the interval excludes zero."""
        return self.low > 0 or self.high < 0


def resampled_means(values: FloatArray, groups: IntArray | None, rng: np.random.Generator) -> FloatArray:
    """DRAWS means of resampled values.

    Args:
        values: (n,), n at least 1; or (n, 2, C), see `protocol.Score`.
        groups: (n,) numbers from 0; whole groups are drawn, since their items are no independent evidence.
    """
    units = np.arange(len(values)) if groups is None else groups
    if values.ndim == 3:
        return _resampled_ratios(values, units, rng)
    sums, counts = np.bincount(units, values), np.bincount(units).astype(np.float64)
    sums, counts = sums[counts > 0], counts[counts > 0]
    kinds, often = np.unique(np.stack([sums, counts], axis=1), axis=0, return_counts=True)
    means = []
    step = max(1, _CELLS // len(kinds))
    for start in range(0, DRAWS, step):
        drawn = rng.multinomial(len(sums), often / often.sum(), size=min(step, DRAWS - start))
        means.append((drawn @ kinds[:, 0]) / (drawn @ kinds[:, 1]))
    return np.concatenate(means)


def _resampled_ratios(values: FloatArray, units: IntArray, rng: np.random.Generator) -> FloatArray:
    present = np.unique(units)
    sums = np.zeros((len(present), *values.shape[1:]))
    np.add.at(sums, np.searchsorted(present, units), values)
    means = []
    step = max(1, _CELLS // max(len(sums), sums[0].size))
    for start in range(0, DRAWS, step):
        drawn = rng.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=min(step, DRAWS - start))
        of_draws: FloatArray = drawn.astype(np.float64) @ sums.reshape(len(sums), -1)
        means.append(mean_ratio(of_draws.reshape(-1, *values.shape[1:])))
    return np.concatenate(means)


def interval(value: float, means: FloatArray) -> Interval:
    """The interval of a value whose resampled versions are given."""
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high))


@dataclass(frozen=True)
class Row:
    """Row of a table: one number of all models."""

    name: str
    items: int
    values: Mapping[str, Interval]  #: model -> its number; without models that have none
    differences: Mapping[str, Interval]  #: model -> its number minus that of the first model


def rows_of(results: Results, averages: Mapping[str, Sequence[str]]) -> list[Row]:
    """A row for each number, in the order in which they came.

    Args:
        results: the first model is what the others are compared with.
        averages: name of a further row -> names of the numbers whose mean it is, each data set counting the same.
    """
    names = list(dict.fromkeys(name for scores in results.values() for name in scores))
    return [_row(name, [name], results) for name in names] + [
        _row(name, parts, results) for name, parts in averages.items()
    ]


def _row(name: str, names: Sequence[str], results: Results) -> Row:
    base = next(iter(results))
    having = [label for label, scores in results.items() if all(part in scores for part in names)]
    parts = {label: [results[label][part] for part in names] for label in having}
    values = {label: _interval(name, parts[label]) for label in having}
    differences = {}
    for label in having if base in having else ():
        if label != base:
            pairs = list(zip(parts[label], parts[base], strict=True))
            assert all(new.values.shape == old.values.shape for new, old in pairs), name
            differences[label] = _difference(name, pairs)
    return Row(name, sum(len(score.values) for score in parts[having[0]]) if having else 0, values, differences)


def _interval(name: str, parts: Sequence[Score]) -> Interval:
    rng = np.random.default_rng(zlib.crc32(name.encode()))  # the same numbers every time the table is made
    means = [resampled_means(score.values, score.groups, rng) for score in parts]
    return interval(float(np.mean([score.value for score in parts])), np.mean(means, axis=0))


def _difference(name: str, pairs: Sequence[tuple[Score, Score]]) -> Interval:
    """Of (new, old), item by item: both are resampled by the same draws."""
    if all(new.values.ndim == 1 for new, _ in pairs):
        return _interval(name, [replace(new, values=new.values - old.values, groups=old.groups) for new, old in pairs])
    assert len(pairs) == 1, name  # no average has ratios
    (new, old), seed = pairs[0], zlib.crc32(name.encode())
    means = [resampled_means(one.values, one.groups, np.random.default_rng(seed)) for one in (new, old)]
    return interval(new.value - old.value, means[0] - means[1])


def section(rows: Sequence[Row], labels: Sequence[str]) -> Section:
    """The table for a console, in percent; a difference with its interval, marked * where that leaves zero out."""
    base, *others = labels
    columns = ["", "n", base]
    for label in others:
        columns += [label, "difference"]
    lines = []
    for row in rows:
        line = [row.name, str(row.items), _percent(row.values.get(base))]
        for label in others:
            line += [_percent(row.values.get(label)), _change(row.differences.get(label))]
        lines.append(line)
    return Section(f"percent; of differences the {LEVEL:.0%} interval", lines, columns)


def _percent(value: Interval | None) -> str:
    return "–" if value is None else f"{100 * value.value:.2f}"


def _change(value: Interval | None) -> str:
    if value is None:
        return "–"
    mark = " *" if value.sure else ""
    return f"{100 * value.value:+.2f} [{100 * value.low:+.2f}, {100 * value.high:+.2f}]{mark}"


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows in JSON's types, as fractions of one."""
    return [asdict(row) for row in rows]


# -------------------------------------------------------------------------------------------------------------- sheets


def disagreements(scores: Mapping[str, Score], count: int) -> IntArray:
    """Places of images worth a look: those which the last model alone has right, those which the first alone has right,
    by turns; then those where both are wrong in different words. Of a single model, those that it has wrong.
    """
    if len(scores) == 1:
        (only,) = scores.values()
        return np.flatnonzero(only.values < 1)[:count].astype(np.int64)
    first, *_, last = scores.values()
    gained, lost = (np.flatnonzero(mask) for mask in (last.values > first.values, last.values < first.values))
    pairs = [
        place
        for index in range(max(len(gained), len(lost)))
        for side in (gained, lost)
        for place in side[index : index + 1]
    ]
    other = [place for place, pair in enumerate(zip(first.said, last.said, strict=True)) if pair[0] != pair[1]]
    return np.array(list(dict.fromkeys([*pairs, *other]))[:count], dtype=np.int64)


def sheet(benchmark: Benchmark, scores: Mapping[str, Score], count: int) -> Picture | None:
    """Images on which the first and the last of several models disagree, or that the only one has wrong, each above the
    answers; None without any.

    Args:
        scores: model -> the same score of each, with the predictions.
    """
    places = disagreements(scores, count).tolist() if scores else []
    if not places:
        return None
    shows = next(iter(scores.values())).shows
    truths, images = benchmark.truths[shows], benchmark.sets[shows]
    return grid(
        [_cell(images.read(place), truths[place], place, scores) for place in places],
        columns=min(_COLUMNS, len(places)),
    )


def _cell(image: Image.Image, truth: str, place: int, scores: Mapping[str, Score]) -> Picture:
    lines: list[tuple[str, Colour]] = [(f"right: {truth}", INK)]
    for label, score in scores.items():
        lines.append((f"{label}: {score.said[place]}", _RIGHT if score.values[place] else _WRONG))
    canvas = Image.fromarray(paper(_SIDE + _LINE * len(lines) + 6, _SIDE))
    small = scaled(np.asarray(image), _SIDE)
    canvas.paste(small, ((_SIDE - small.width) // 2, (_SIDE - small.height) // 2))
    draw = ImageDraw.Draw(canvas)
    for number, (text, colour) in enumerate(lines):
        draw.text((2, _SIDE + 4 + number * _LINE), _fitting(text), fill=colour, font=letters(_SIZE))
    return np.asarray(canvas)


def _fitting(text: str) -> str:
    """The beginning of a text that fits below an image."""
    font = letters(_SIZE)
    if font.getlength(text) <= _SIDE - 4:
        return text
    ends = range(len(text), 0, -1)
    return next((f"{text[:end]}…" for end in ends if font.getlength(f"{text[:end]}…") <= _SIDE - 4), "…")


def order(labels: Sequence[str], scores: Mapping[str, Mapping[str, Score]], name: str) -> dict[str, Score]:
    """The models that have a score with answers, in the order of the table."""
    return {label: scores[label][name] for label in labels if name in scores[label] and scores[label][name].said}
