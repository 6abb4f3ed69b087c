"""The one table of a comparison: each number of each arm, and what changed against the first; and sheets of single
images on which models disagree, or one is wrong.

An arm is a model, or several of one recipe with different seeds. Differences are taken item by item before they are
resampled: two models that fail on the same images differ surely by little, even where each of their numbers alone is
unsure.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from visft_ds.evals.benchmarks.intervals import (
    LEVEL,
    Interval,
    holm,
    interval,
    over_both,
    over_seeds,
    resampled,
    two_sided,
    with_few,
)
from visft_ds.evals.benchmarks.protocol import Benchmark, FloatArray, IntArray, Score
from visft_ds.monitor.console import Section
from visft_ds.tasks.pictures import INK, Colour, Picture, grid, letters, paper, scaled

_SIDE, _SIZE, _LINE = 220, 13, 18  # of an image; of letters and lines of text, pixels
_RIGHT, _WRONG = (29, 122, 51), (179, 38, 30)
_COLUMNS = 4
_BESIDE = 3  # arms that fit beside the first one

Results = Mapping[str, Mapping[str, Score]]  #: model -> name -> score
Parts = Sequence[Score]  #: what a number is the mean of


@dataclass(frozen=True)
class Seeds:
    """Parts of a difference over several seeds."""

    each: tuple[float, ...]  #: the difference of each
    items: Interval  #: of these seeds on other items
    seeds: Interval  #: of other seeds on these items


@dataclass(frozen=True)
class Row:
    """Row of a table: one number of all arms."""

    name: str
    items: int
    values: Mapping[str, Interval]  #: arm -> its number; without arms that have none
    differences: Mapping[str, Interval]  #: arm -> its number minus that of the first arm, over items and seeds
    p: Mapping[str, float]  #: arm -> p value of its difference, two-sided
    seeds: Mapping[str, Seeds]  #: arm of several seeds -> what its interval is made of
    shown: Mapping[str, bool] = field(default_factory=dict)  #: arm -> decision about its difference, see `decide`


def rows_of(
    results: Results,
    averages: Mapping[str, Sequence[str]],
    arms: Mapping[str, Sequence[str]] | None = None,
    primary: str | None = None,
) -> list[Row]:
    """A row for each number, in the order in which they came.

    Args:
        results: the first arm is what the others are compared with, seed by seed where both have several.
        averages: name of a further row -> names of the numbers whose mean it is, each data set counting the same.
        arms: name -> its models; None: each model is one.
        primary: see `decide`.
    """
    arms = {label: [label] for label in results} if arms is None else arms
    names = list(dict.fromkeys(name for scores in results.values() for name in scores))
    rows = [_row(name, [name], results, arms) for name in names]
    rows += [_row(name, parts, results, arms) for name, parts in averages.items()]
    return rows if primary is None else decide(rows, primary)


def decide(rows: Sequence[Row], primary: str) -> list[Row]:
    """Say of each arm which of its differences are shown: the primary one by its own interval, the others by Holm.

    Raises:
        ValueError: there is no such row.
    """
    if primary not in (names := [row.name for row in rows]):
        raise ValueError(f"--primary {primary}: no such number; there are {', '.join(names)}")
    shown: dict[str, dict[str, bool]] = {}
    for label in dict.fromkeys(label for row in rows for label in row.p):
        others = holm({row.name: row.p[label] for row in rows if label in row.p and row.name != primary})
        for row in rows:
            if label in row.p:
                sure = row.differences[label].sure if row.name == primary else others[row.name]
                shown.setdefault(row.name, {})[label] = sure
    return [replace(row, shown=shown.get(row.name, {})) for row in rows]


def _row(name: str, names: Sequence[str], results: Results, arms: Mapping[str, Sequence[str]]) -> Row:
    having = {
        arm: [[results[label][part] for part in names] for label in labels]
        for arm, labels in arms.items()
        if all(part in results[label] for label in labels for part in names)
    }
    base = next(iter(arms))
    values = {arm: _interval(name, *_resampled(name, seeds, None)) for arm, seeds in having.items()}
    differences, p, of_seeds = {}, {}, {}
    for arm, seeds in having.items() if base in having else ():
        if arm == base:
            continue
        each, means = _resampled(name, seeds, having[base])
        found = _interval(name, each, means), two_sided(over_both(each, means, _rng(name, "seeds")))
        differences[arm], p[arm] = with_few(*found, sum(map(_units, seeds[0])))
        if len(each) > 1:
            items = interval(float(each.mean()), means.mean(axis=0))
            of_seeds[arm] = Seeds(tuple(each.tolist()), items, over_seeds(each))
    count = sum(len(score.values) for score in next(iter(having.values()))[0]) if having else 0
    return Row(name, count, values, differences, p, of_seeds)


def _units(score: Score) -> int:
    """Number of independent items."""
    return len(score.values if score.groups is None else np.unique(score.groups))


def _rng(name: str, part: str = "") -> np.random.Generator:
    """The same numbers every time the table is made."""
    return np.random.default_rng(zlib.crc32(f"{name}{part}".encode()))


def _interval(name: str, values: FloatArray, means: FloatArray) -> Interval:
    return interval(float(values.mean()), over_both(values, means, _rng(name, "seeds")))


def _resampled(name: str, new: Sequence[Parts], old: Sequence[Parts] | None) -> tuple[FloatArray, FloatArray]:
    """(numbers (seeds,), the same resampled (seeds, DRAWS)) of each seed, minus those of the old ones where given.

    All seeds of both are resampled by the same draws.
    """
    count = max(len(new), len(old or ()))
    new, old = (list(part) * count if len(part) == 1 else part for part in (new, old or ((),)))
    rng, values, means = _rng(name), [], []
    for part in range(len(new[0])):
        scores = [seed[part] for seed in new]
        olds = [seed[part] for seed in old if seed]
        assert all(score.values.shape == scores[0].values.shape for score in (*scores, *olds)), name
        groups, each = scores[0].groups, [score.values for score in scores]
        if each[0].ndim == 1:  # item by item
            each = [score.values - past.values for score, past in zip(scores, olds, strict=True)] if olds else each
            values.append([float(one.mean()) for one in each])
            means.append(resampled(each, groups, rng))
            continue
        values.append([score.value for score in scores])
        drawn = resampled([*each, *(score.values for score in olds)], groups, rng)
        if olds:
            values[-1] = [score.value - past.value for score, past in zip(scores, olds, strict=True)]
            drawn = drawn[:count] - drawn[count:]
        means.append(drawn)
    return np.mean(values, axis=0), np.mean(means, axis=0)


def section(rows: Sequence[Row], labels: Sequence[str], primary: str | None = None) -> Section:
    """The table for a console, in percent; a difference with its interval, marked * where that leaves zero out; with a
    primary number, where it is shown.
    """
    base, *others = labels
    if len(others) > _BESIDE:  # one below the other
        columns = ["", "n", "", "", "difference"]
        lines = [
            [
                row.name,
                str(row.items),
                label,
                _percent(row.values.get(label)),
                "" if label == base else change(row, label),
            ]
            for row in rows
            for label in labels
        ]
    else:
        columns = ["", "n", base, *(word for label in others for word in (label, "difference"))]
        lines = [[row.name, str(row.items), _percent(row.values.get(base))] for row in rows]
        for line, row in zip(lines, rows, strict=True):
            line += [word for label in others for word in (_percent(row.values.get(label)), change(row, label))]
    marked = "" if primary is None else f"; * is shown: {primary} by its own interval, the others by Holm"
    return Section(f"percent; of differences the {LEVEL:.0%} interval{marked}", lines, columns)


def seeds_section(rows: Sequence[Row]) -> Section | None:
    """Table of what the intervals of arms of several seeds are made of; None without any."""
    lines = [
        [label, row.name, " ".join(f"{100 * one:+.2f}" for one in of.each), of.items.bounds(), of.seeds.bounds()]
        for row in rows
        for label, of in row.seeds.items()
    ]
    title = "differences by seed, and their intervals over items alone and over seeds alone (Student's t)"
    return Section(title, lines, ["arm", "", "each", "items", "seeds"]) if lines else None


def verdict(row: Row, label: str) -> str:
    """A decided difference in words: "not shown: +0.40 [-1.90, +2.70]"."""
    shown = "shown" if row.shown[label] else "not shown"
    return f"{shown}: {row.differences[label].text()}"


def change(row: Row, label: str) -> str:
    """A difference with its interval, in percent; marked as `section` says."""
    value = row.differences.get(label)
    return "–" if value is None else value.text(shown=row.shown.get(label, value.sure))


def _percent(value: Interval | None) -> str:
    return "–" if value is None else f"{100 * value.value:.2f}"


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
