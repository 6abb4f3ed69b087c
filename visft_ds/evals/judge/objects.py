"""Grounded object identification: what is the object in a box called?

The model sees a square around the box, its longer side times MARGIN (what lies outside of the image is grey), and
answers by text (the category whose sentence is nearest, if it has a text side) and by probe (logistic regression on
frozen features). The protocol of the ViSFT paper is not known to us; this one is ours.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace

import numpy as np
from PIL import Image

from visft_ds.evals.judge.dense_sets import DenseSet
from visft_ds.evals.judge.images import changed, chosen
from visft_ds.evals.judge.probes import Rows, by_regression
from visft_ds.evals.judge.protocol import (
    PLAIN,
    Benchmark,
    Features,
    ImageSet,
    IntArray,
    Score,
    hits,
    rank_by_text,
    sentences,
)

MARGIN = 1.2
SMALLEST = 16.0  #: sides of a box below which nobody could recognise it, pixels
_GREY = (128, 128, 128)


def grounding(label: str, train: DenseSet, test: DenseSet) -> Benchmark:
    """Accuracy of naming the object in a box."""
    (taught, *learnt), (shown, *judged) = _boxes(train), _boxes(test)
    names = [name for name in test.classes if name]

    def scores(features: Features, wanted: Collection[str]) -> Iterator[Score]:
        if "texts" in features and "clip" in features["test"]:
            ranks = rank_by_text(features["test"]["clip"], features["texts"]["clip"], len(PLAIN), judged[0])
            yield Score("text top1", hits(ranks, 1), judged[1])
        known, asked = (features[part]["pooled"] for part in ("train", "test"))
        yield by_regression("probe", Rows(known, *learnt), Rows(asked, *judged))

    return Benchmark(
        label,
        {"train": taught, "test": shown},
        ("clip", "pooled"),
        ("text top1", "probe"),
        {"benchmark": "objects 3", "names": names},
        scores,
        texts=sentences(names, PLAIN),
    )


def _boxes(data: DenseSet) -> tuple[ImageSet, IntArray, IntArray]:
    """(boxes as images, their labels, numbers of the images they are in); at least SMALLEST pixels wide and high."""
    large = [thing for thing in data.things if min(thing.box[2:]) >= SMALLEST]
    if not large:
        first = f"{data.images.names[0]} and {len(data.images) - 1} other images"
        raise ValueError(f"no object in {first} has a box of at least {SMALLEST:g} x {SMALLEST:g} pixels")
    owners = np.array([thing.owner for thing in large], dtype=np.int64)
    labels = np.array([thing.label for thing in large], dtype=np.int64) - data.classes.count("")
    pictures = replace(chosen(data.images, owners.tolist()), stretched=False)
    how = f"crop {MARGIN} {[thing.box for thing in large]}"
    return changed(pictures, lambda number, image: crop(image, large[number].box), how), labels, owners


def crop(image: Image.Image, box: tuple[float, ...]) -> Image.Image:
    """The square of MARGIN times the longer side around a box (x, y, width, height)."""
    x, y, width, height = box
    side = max(1, round(MARGIN * max(width, height)))
    left, top = round(x + width / 2 - side / 2), round(y + height / 2 - side / 2)
    canvas = Image.new("RGB", (side, side), _GREY)
    canvas.paste(image, (-left, -top))
    return canvas
