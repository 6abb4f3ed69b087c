"""Pictures of a page: images beside their labels and what each model sees in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from visft_ds.data.decode import as_rgb
from visft_ds.evals.judge.benchmark import FloatArray, ImageSet, Score
from visft_ds.evals.judge.dense_sets import DenseSet
from visft_ds.tasks.pictures import Picture, draw_objects, grid, palette, side_by_side

SIDE = 224  #: pixels of a panel


def segmentation_sheet(test: DenseSet, scores: Mapping[str, Score], count: int) -> Picture:
    """Images beside their labels and what each model sees: `typical` ones by the change from the first of
    several models to the last.

    The number above is the overlap in percent, over all classes (of objects, those) together: a few stray
    pixels of another class would halve a mean over the classes of one image.

    Args:
        scores: model -> its score with maps.
    """
    overlaps = {model: _overlaps(test, score) for model, score in scores.items()}
    first, *_, last = overlaps.values()
    rows = []
    for number in typical(last - first, count):
        image = _pixels(test.images, number)
        plain = draw_objects(image, [], [], {}, side=SIDE)
        truth = _drawn(image, test.label(number), test.classes)
        panels = [(plain, "picture"), (truth, "ground truth")]
        for model, score in scores.items():
            assert score.maps is not None, model
            drawn = _drawn(image, score.maps[number], test.classes)
            percent = 100 * overlaps[model][number]
            panels.append((drawn, f"{model}: {percent:.0f}"))
        rows.append(side_by_side(*panels))
    return grid(rows)


def _pixels(images: ImageSet, number: int) -> Picture:
    if images.read_bands is None:
        return np.asarray(images.read(number))
    return as_rgb(255 * images.read_bands(number).movedim(0, 2).numpy())


def _overlaps(test: DenseSet, score: Score) -> FloatArray:
    """(images,), intersection over union of all classes of objects together."""
    values = score.values
    if test.classes[0] == "":
        values = values[..., 1:]
    sums = values.sum(axis=2)
    overlaps: FloatArray = sums[:, 0] / np.maximum(sums[:, 1], 1)
    return overlaps


def _drawn(image: Picture, numbers: npt.NDArray[Any], classes: Sequence[str]) -> Picture:
    """An image that is pale below its segmentation."""
    pale = (0.35 * image + 165).astype(np.uint8)
    names = []
    masks = []
    for number, name in enumerate(classes):
        mask = numbers == number
        if name and mask.any():
            names.append(name)
            masks.append(mask)
    tags = [""] * len(names)
    return draw_objects(pale, names, tags, palette(classes), masks=masks, side=SIDE)


def typical(changes: FloatArray, count: int) -> list[int]:
    """Places of at most so many items, from the worst change to the best, whose ranks are evenly spaced.

    Half of all changes lie on either side of the middle one. The items that change most would show more than
    the mean.
    """
    order = np.argsort(changes, kind="stable")
    count = min(count, len(order))
    middles = np.arange(count) + 0.5
    ranks = middles * len(order) / count
    chosen: list[int] = order[ranks.astype(int)].tolist()
    return chosen
