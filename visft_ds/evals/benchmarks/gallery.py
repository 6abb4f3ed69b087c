"""Single images on which models disagree, or one is wrong: the prediction, and what is right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw

from visft_ds.evals.benchmarks.protocol import Benchmark, IntArray, Score
from visft_ds.tasks.pictures import INK, Colour, Picture, grid, letters, paper, scaled

_SIDE, _SIZE, _LINE = 220, 13, 18  # of an image; of letters and lines of text, pixels
_RIGHT, _WRONG = (29, 122, 51), (179, 38, 30)
_COLUMNS = 4


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
