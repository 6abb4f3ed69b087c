"""Pictures of a page: images beside their labels and what each model sees in them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from visft_ds.evals.judge.benchmark import FloatArray, Score
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
    background = 1 if test.classes[0] == "" else 0  # the number of the first class that counts
    overlaps = {}
    for model, score in scores.items():
        both = score.values[..., background:].sum(axis=2)
        overlaps[model] = both[:, 0] / np.maximum(both[:, 1], 1)
    first, *_, last = overlaps.values()
    colours = palette(test.classes)
    rows = []
    for place in typical(last - first, count):
        image = np.asarray(test.images.read(place))
        pale = (0.35 * image + 165).astype(np.uint8)
        segmentations = {"what is there": test.label(place)}
        for model, score in scores.items():
            assert score.maps is not None, model
            segmentations[f"{model}: {100 * overlaps[model][place]:.0f}"] = score.maps[place]
        panels = [(draw_objects(image, [], [], colours, masks=[], side=SIDE), "picture")]
        for title, numbers in segmentations.items():
            masks = {}
            for number, name in enumerate(test.classes):
                mask = numbers == number
                if name and mask.any():
                    masks[name] = mask
            no_tags = [""] * len(masks)
            drawn = draw_objects(pale, list(masks), no_tags, colours, masks=list(masks.values()), side=SIDE)
            panels.append((drawn, title))
        rows.append(side_by_side(*panels))
    return grid(rows)


def typical(changes: FloatArray, count: int) -> list[int]:
    """Places of at most so many items, from the worst change to the best, whose ranks are evenly spaced.

    Half of all changes lie on either side of the middle one. The items that change most would show more than
    the mean.
    """
    order = np.argsort(changes, kind="stable")
    count = min(count, len(order))
    ranks = (np.arange(count) + 0.5) * len(order) / count
    return order[ranks.astype(int)].tolist()
