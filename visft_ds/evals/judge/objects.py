"""Names of boxed objects: is what a box shows told by text, and by logistic regression?

Of an object the model sees a square around its box, the longer side times MARGIN (what lies outside of the
image is grey), and answers by text (the category whose sentence is nearest, if it has a text side) and by
logistic regression. The protocol of the ViSFT paper is not known to us; this one is ours.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from faster_coco_eval import mask as coco_mask  # pycocotools' own warns under NumPy 2
from PIL import Image
from torch import Tensor

from visft_ds.evals.judge.benchmark import Benchmark, Features, ImageSet, IntArray, Number, Score
from visft_ds.evals.judge.dense_sets import DenseSet, Thing
from visft_ds.evals.judge.images import changed, chosen
from visft_ds.evals.judge.logistic import by_regression
from visft_ds.evals.judge.neighbours import Rows
from visft_ds.evals.judge.ranking import PLAIN, hits, rank_by_text, sentences

MARGIN = 1.2
SMALLEST = 16.0  #: sides of a box below which nobody could recognise it, pixels
_GREY = (128, 128, 128)


NUMBERS = (
    Number(
        "text top1", how="The category whose sentence is most similar to the crop of a box is the right one."
    ),
    Number("probe", how="Logistic regression names the crop of a box."),
)


def grounding(label: str, train: DenseSet, test: DenseSet) -> Benchmark:
    """Accuracy of naming the object in a box."""
    (taught, learnt), (shown, judged) = _boxes(train), _boxes(test)
    names = [name for name in test.classes if name]

    def scores(features: Features, wanted: Collection[str]) -> Iterator[Score]:
        known = rows_of(features["train"]["pooled"], learnt, train.images.groups)
        asked = rows_of(features["test"]["pooled"], judged, test.images.groups)
        if "texts" in features and "clip" in features["test"]:
            right = asked.labels.numpy() - test.classes.count("")
            ranks = rank_by_text(features["test"]["clip"], features["texts"]["clip"], len(PLAIN), right)
            yield Score("text top1", hits(ranks, 1), asked.owners.numpy())
        yield by_regression("probe", known, asked)

    return Benchmark(
        label,
        {"train": taught, "test": shown},
        ("clip", "pooled"),
        NUMBERS,
        {"benchmark": "objects 4", "names": names},
        scores,
        texts=sentences(names, PLAIN),
    )


def _boxes(data: DenseSet) -> tuple[ImageSet, Sequence[Thing]]:
    """(boxes as images, what is in them), of those that are at least SMALLEST pixels wide and high."""
    boxed = [(thing, coco_mask.toBbox(thing.code).tolist()) for thing in data.things]
    large = [(thing, box) for thing, box in boxed if min(box[2:]) >= SMALLEST]
    if not large:
        raise ValueError(f"no object has a box of at least {SMALLEST:g} pixels ({data.images.names[0]}, ...)")
    things, boxes = zip(*large, strict=True)
    # Scores are in groups by their rows' owners, as objects of an image are no independent evidence.
    pictures = replace(chosen(data.images, [thing.owner for thing in things]), stretched=False, groups=None)
    return changed(
        pictures, lambda number, image: crop(image, boxes[number]), f"crop {MARGIN} {boxes}"
    ), things


def crop(image: Image.Image, box: tuple[float, ...]) -> Image.Image:
    """The square of MARGIN times the longer side around a box (x, y, width, height)."""
    x, y, width, height = box
    side = max(1, round(MARGIN * max(width, height)))
    left, top = round(x + width / 2 - side / 2), round(y + height / 2 - side / 2)
    canvas = Image.new("RGB", (side, side), _GREY)
    canvas.paste(image, (-left, -top))
    return canvas


def rows_of(features: Tensor, things: Sequence[Thing], groups: IntArray | None) -> Rows:
    """Objects as rows, which belong to their image or, if there are such, to the group of their image."""
    labels = torch.tensor([thing.label for thing in things])
    owners = np.array([thing.owner for thing in things])
    if groups is not None:
        owners = groups[owners]
    return Rows(features, labels, torch.from_numpy(owners)).to(features.device)
