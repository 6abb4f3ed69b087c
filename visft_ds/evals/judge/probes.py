"""Classification of images, and of the objects in them, by frozen features.

Nearest neighbours vote as in DINO (https://arxiv.org/abs/2104.14294, 4.1): the 20 nearest by cosine, each with
exp(similarity / 0.07). Logistic regression reads the class token beside the mean of the patches, as DINOv2's linear
classifier does (one of the two where a model has no other), centred and divided by one number for all channels; its
strength of regularisation is the best of STRENGTHS on a fifth of the training images, which it then learns as well.

Of an object the model sees a square around its box, the longer side times MARGIN (what lies outside of the image is
grey), and answers by text (the category whose sentence is nearest, if it has a text side) and by logistic regression.
The protocol of the ViSFT paper is not known to us; this one is ours.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from faster_coco_eval import mask as coco_mask  # pycocotools' own warns under NumPy 2
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from visft_ds.evals.judge import heads
from visft_ds.evals.judge.classes import ClassSet
from visft_ds.evals.judge.dense_sets import DenseSet, Thing
from visft_ds.evals.judge.images import changed, chosen
from visft_ds.evals.judge.in_context import RESAMPLES, ROWS, Memory, vote
from visft_ds.evals.judge.protocol import (
    PLAIN,
    Benchmark,
    Features,
    ImageSet,
    IntArray,
    Score,
    hits,
    rank_by_text,
    rank_of,
    resamples,
    sentences,
)
from visft_ds.monitor.console import gauge

NEIGHBOURS, TEMPERATURE = 20, 0.07
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)  #: scikit-learn's C
_FEW = 1.0  # the strength where no class has images to spare
_STEPS = 5000
_SMALL = 2**23  # numbers
MARGIN = 1.2
SMALLEST = 16.0  #: sides of a box below which nobody could recognise it, pixels
_GREY = (128, 128, 128)


@dataclass(frozen=True)
class Rows:
    """Items with labels, to be told by their features."""

    features: Tensor  #: (n, D)
    labels: IntArray  #: (n,)
    owners: IntArray  #: (n,), numbers of the images that they are in

    def part(self, places: npt.NDArray[Any]) -> Rows:
        """Some of them, by number or by a mask."""
        return Rows(self.features[torch.from_numpy(places)], self.labels[places], self.owners[places])


def rows_of(features: Tensor, things: Sequence[Thing]) -> Rows:
    """Objects as rows."""
    return Rows(features, np.array([thing.label for thing in things]), np.array([thing.owner for thing in things]))


def classification(label: str, train: ClassSet, test: ClassSet) -> Benchmark:
    """kNN and linear accuracy."""
    probes = {"kNN": by_neighbours, "linear": by_regression}

    def rows(number: str, features: Mapping[str, Tensor], labels: IntArray) -> Rows:
        kinds = ("pooled",) if number == "kNN" else ("pooled", "mean")
        return Rows(
            torch.cat([features[kind] for kind in kinds if kind in features], dim=1), labels, np.arange(len(labels))
        )

    def scores(features: Features, wanted: Collection[str]) -> Iterator[Score]:
        for name in (name for name in probes if name in wanted):
            known, asked = rows(name, features["train"], train.labels), rows(name, features["test"], test.labels)
            yield probes[name](name, known, asked)

    def held_out(features: Mapping[str, Tensor], number: str) -> float:
        known, held = rows(number, features, train.labels), _held(train.labels)
        if not held.any():
            raise ValueError(f"{label} has no class of five training images; a fifth of them chooses a layer")
        return probes[number](number, known.part(~held), known.part(held), 0).value

    labels = [train.labels.tolist(), test.labels.tolist()]
    return Benchmark(
        label,
        {"train": train.images, "test": test.images},
        ("pooled", "mean"),
        tuple(probes),
        {"benchmark": "classification 1", "protocol": STRENGTHS, "labels": labels, "names": list(test.classes)},
        scores,
        held_out=held_out,
    )


def grounding(label: str, train: DenseSet, test: DenseSet) -> Benchmark:
    """Accuracy of naming the object in a box."""
    (taught, learnt), (shown, judged) = _boxes(train), _boxes(test)
    names = [name for name in test.classes if name]

    def scores(features: Features, wanted: Collection[str]) -> Iterator[Score]:
        known, asked = rows_of(features["train"]["pooled"], learnt), rows_of(features["test"]["pooled"], judged)
        if "texts" in features and "clip" in features["test"]:
            right = asked.labels - test.classes.count("")
            ranks = rank_by_text(features["test"]["clip"], features["texts"]["clip"], len(PLAIN), right)
            yield Score("text top1", hits(ranks, 1), asked.owners)
        yield by_regression("probe", known, asked)

    return Benchmark(
        label,
        {"train": taught, "test": shown},
        ("clip", "pooled"),
        ("text top1", "probe"),
        {"benchmark": "objects 3", "names": names},
        scores,
        texts=sentences(names, PLAIN),
    )


def _boxes(data: DenseSet) -> tuple[ImageSet, Sequence[Thing]]:
    """(boxes as images, what is in them), of those that are at least SMALLEST pixels wide and high."""
    boxed = [(thing, coco_mask.toBbox(thing.code).tolist()) for thing in data.things]
    large = [(thing, box) for thing, box in boxed if min(box[2:]) >= SMALLEST]
    if not large:
        raise ValueError(f"no object in {data.images.names[0]} and so on has a box of at least {SMALLEST:g} pixels")
    things, boxes = zip(*large, strict=True)
    pictures = replace(chosen(data.images, [thing.owner for thing in things]), stretched=False)
    return changed(pictures, lambda number, image: crop(image, boxes[number]), f"crop {MARGIN} {boxes}"), things


def crop(image: Image.Image, box: tuple[float, ...]) -> Image.Image:
    """The square of MARGIN times the longer side around a box (x, y, width, height)."""
    x, y, width, height = box
    side = max(1, round(MARGIN * max(width, height)))
    left, top = round(x + width / 2 - side / 2), round(y + height / 2 - side / 2)
    canvas = Image.new("RGB", (side, side), _GREY)
    canvas.paste(image, (-left, -top))
    return canvas


def by_neighbours(name: str, train: Rows, test: Rows, draws: int = RESAMPLES) -> Score:
    """1.0 for each row whose neighbours vote for its class alone."""
    known = F.normalize(train.features, dim=1)
    memory = Memory(known, torch.from_numpy(train.labels), torch.from_numpy(train.owners))
    right = []
    for part, there in zip(test.features.split(ROWS), torch.from_numpy(test.labels).split(ROWS), strict=True):
        votes = vote(memory, part, NEIGHBOURS, TEMPERATURE, draws)
        votes = F.pad(votes, (0, max(0, int(test.labels.max()) + 1 - votes.shape[2])))  # classes that were not taught
        right.append(np.stack([hits(rank_of(one, there), 1) for one in votes]))
    found = np.concatenate(right, axis=1)
    return Score(name, found[0], test.owners, retrained=found[1:].mean(axis=1))


def by_regression(name: str, train: Rows, test: Rows, draws: int = heads.RESAMPLES) -> Score:
    """1.0 for each row whose class logistic regression predicts."""
    held, strength = _held(train.labels), _FEW
    if held.any():
        rest, fifth = train.part(~held), train.part(held)
        tried = gauge("linear probe", len(STRENGTHS), "strengths", STRENGTHS)
        right = [(_predicted(rest, fifth, one) == fifth.labels).mean() for one in tried]
        strength = STRENGTHS[int(np.argmax(right))]
    copies = resamples(int(train.owners.max()) + 1, draws)[:, train.owners]
    said = [_predicted(train.part(np.repeat(np.arange(len(held)), of)), test, strength) for of in copies]
    found = (np.stack(said) == test.labels).astype(np.float64)
    return Score(name, found[0], test.owners, retrained=found[1:].mean(axis=1))


def _held(labels: IntArray) -> npt.NDArray[np.bool_]:
    """Every fifth image of a class; of a class of fewer than five none."""
    held = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        held[np.flatnonzero(labels == label)[4::5]] = True
    return held


def _predicted(train: Rows, test: Rows, strength: float) -> IntArray:
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    if len(np.unique(train.labels)) < 2:
        return np.full(len(test.labels), train.labels[0], dtype=np.int64)
    known, asked = train.features.numpy(), test.features.numpy()
    middle = known.mean(axis=0, dtype=np.float64)
    spread = math.sqrt(float(((known - middle) ** 2).mean())) or 1.0
    # Threads would spend more time on waiting than on products of small arrays.
    with threadpool_limits(1 if known.size < _SMALL else None, "blas"):
        model = LogisticRegression(C=strength, max_iter=_STEPS).fit((known - middle) / spread, train.labels)
    predicted: IntArray = model.predict((asked - middle) / spread).astype(np.int64)
    return predicted
