"""Grounded object identification: what is the object in a box called?

The model sees a square around the box, its longer side times MARGIN (what lies outside of the image is grey), and
answers by text (the category whose sentence is nearest) and by probe (logistic regression on frozen features, if there
are boxes to train on). The protocol of the ViSFT paper is not known to us; this one is ours.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from visft_ds.evals.judge.images import changed, from_files, inside, read_json
from visft_ds.evals.judge.probes import by_regression
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
from visft_ds.files import reading

MARGIN = 1.2
SMALLEST = 16.0  #: sides of a box below which nobody could recognise it, pixels
_GREY = (128, 128, 128)

Box = tuple[float, float, float, float]  # x, y, w, h


@dataclass(frozen=True)
class ObjectSet:
    """Boxes of known categories, each an image of its own."""

    images: ImageSet
    labels: IntArray  #: (boxes,), places in `classes`
    owners: IntArray  #: (boxes,), numbers of their images
    classes: tuple[str, ...]


def grounding(label: str, train: ObjectSet | None, test: ObjectSet) -> Benchmark:
    """Accuracy of naming the object in a box."""

    def scores(features: Features, wanted: Collection[str]) -> Iterator[Score]:
        if "texts" in features and "clip" in features["test"]:
            ranks = rank_by_text(features["test"]["clip"], features["texts"]["clip"], len(PLAIN), test.labels)
            yield Score("text top1", hits(ranks, 1), test.owners)
        if train is not None:
            learnt, judged = (features[name]["pooled"].numpy() for name in ("train", "test"))
            score = by_regression("probe", learnt, train.labels, judged, test.labels, train.owners)
            yield replace(score, groups=test.owners)

    labels = [part.labels.tolist() for part in (test, train) if part is not None]
    owners, names = test.owners.tolist(), list(test.classes)
    return Benchmark(
        label,
        {"test": test.images, **({} if train is None else {"train": train.images})},
        ("clip",) if train is None else ("clip", "pooled"),
        ("text top1",) if train is None else ("text top1", "probe"),
        {"benchmark": "objects 2", "labels": labels, "owners": owners, "names": names},
        scores,
        texts=sentences(names, PLAIN),
        needs_text=train is None,
    )


def read_train_and_test(source: str, train: str | None, test: str | None) -> tuple[ObjectSet | None, ObjectSet]:
    """(boxes to train a probe on, or None without a training split; boxes to test) of a COCO tree.

    Args:
        train, test: splits; by default `val` and, if it is there, `train`.

    Raises:
        ValueError: as `read_objects`; also if the two splits have other categories.
    """
    split, known = train or "train", (Path(source) / "annotations/instances_train2017.json").is_file()
    if (train or known) and split == (test or "val"):
        raise ValueError(f"{source}: probes would learn from {split} and be judged on it: name two parts")
    held = read_objects(Path(source), test or "val")
    if train is None and not known:
        return None, held
    learnt = read_objects(Path(source), split)
    if lone := sorted(set(learnt.classes) ^ set(held.classes)):
        raise ValueError(f"{source}: the splits have other categories: {', '.join(lone[:5])}")
    order = np.array([held.classes.index(name) for name in learnt.classes], dtype=np.int64)
    return replace(learnt, labels=order[learnt.labels], classes=held.classes), held


def read_objects(root: Path, split: str) -> ObjectSet:
    """Every box of a split of a COCO tree that is no crowd and at least SMALLEST pixels wide and high.

    Raises:
        ValueError: a file that is not COCO's, names what is not there, or has no such box.
    """
    path, folder = root / f"annotations/instances_{split}2017.json", root / f"{split}2017"
    with reading(path, "a COCO annotation file"):
        content = read_json(path)
        names = {category["id"]: str(category["name"]) for category in content["categories"]}
        if len(set(names.values())) < len(names):
            raise ValueError("two categories have the same name: no text can tell them apart")
        numbers = {category: number for number, category in enumerate(names)}
        files = {image["id"]: inside(folder, image["file_name"], path) for image in content["images"]}
        large = [one for one in content["annotations"] if not one.get("iscrowd") and min(one["bbox"][2:]) >= SMALLEST]
        labels = np.array([numbers[one["category_id"]] for one in large], dtype=np.int64)
        pictures = from_files([files[one["image_id"]] for one in large], root)
        boxes: list[Box] = [(float(x), float(y), float(w), float(h)) for x, y, w, h in (one["bbox"] for one in large)]
    if not boxes:
        raise ValueError(f"{path} has no box of at least {SMALLEST:g} x {SMALLEST:g} pixels that is no crowd")
    owners = np.unique([one["image_id"] for one in large], return_inverse=True)[1].astype(np.int64)
    images = changed(pictures, lambda number, image: crop(image, boxes[number]), f"crop {MARGIN} {boxes}")
    return ObjectSet(images, labels, owners, tuple(names.values()))


def crop(image: Image.Image, box: Box) -> Image.Image:
    """The square of MARGIN times the longer side around a box."""
    x, y, width, height = box
    side = max(1, round(MARGIN * max(width, height)))
    left, top = round(x + width / 2 - side / 2), round(y + height / 2 - side / 2)
    canvas = Image.new("RGB", (side, side), _GREY)
    canvas.paste(image, (-left, -top))
    return canvas
