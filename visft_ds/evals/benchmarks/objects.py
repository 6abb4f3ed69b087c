"""Grounded object identification: what is the object in a box called?

The model sees the box in one of two ways, from any COCO-format file:

    crop    a square around the box, its longer side times MARGIN; what lies outside of the image is grey
    marked  the whole image on a grey square, with a red frame around the box

and answers by text (the category whose sentence is nearest) and by probe (logistic regression on frozen features that
were taken in the same way, where there are boxes to train on). The protocol of the ViSFT paper is not known to us; this
one is ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from PIL import Image, ImageDraw
from pydantic import Field

from visft_ds.config.records import Finite, Number, read_record
from visft_ds.evals.benchmarks.class_sets import PLAIN
from visft_ds.evals.benchmarks.images import changed, chosen, from_files
from visft_ds.evals.benchmarks.probes import linear_probe
from visft_ds.evals.benchmarks.protocol import (
    Features,
    ImageSet,
    IntArray,
    Score,
    check_apart,
    class_embeddings,
    hits,
    rank_of,
    sentences,
)
from visft_ds.evals.benchmarks.retrieval import ForeignRecord, ListedImage
from visft_ds.names import checked_name

VIEWS = ("crop", "marked")
MARGIN = 1.2
SMALLEST = 16.0  #: sides of a box below which nobody could recognise it, pixels
_GREY, _RED = (128, 128, 128), (255, 0, 0)
_KEPT = 8  # decoded images
_FRAME = 0.01  # width of the frame, of the longer side of the image

Box = tuple[float, float, float, float]  # x, y, w, h


@dataclass(frozen=True)
class ObjectSet:
    """Boxes of known categories, each an image of its own in two views."""

    views: Mapping[str, ImageSet]
    labels: IntArray  #: (boxes,), places in `classes`
    owners: IntArray  #: (boxes,), numbers of their images
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Objects:
    """Accuracy of naming the object in a box."""

    label: str
    test: ObjectSet
    train: ObjectSet | None

    @property
    def needs_text(self) -> bool:
        return self.train is None

    @property
    def kinds(self) -> Sequence[str]:
        return ("clip",) if self.train is None else ("clip", "pooled")

    @property
    def sets(self) -> Mapping[str, ImageSet]:
        training = {} if self.train is None else {f"train {name}": images for name, images in self.train.views.items()}
        return {**self.test.views, **training}

    @property
    def texts(self) -> Sequence[str]:
        return sentences(self.test.classes, PLAIN)

    @property
    def truths(self) -> Mapping[str, Sequence[str]]:
        names = [self.test.classes[label] for label in self.test.labels]
        return dict.fromkeys(VIEWS, names)

    @property
    def settings(self) -> Mapping[str, Any]:
        labels = [part.labels.tolist() for part in (self.test, self.train) if part is not None]
        names = list(self.test.classes)
        return {"benchmark": "objects 1", "labels": labels, "owners": self.test.owners.tolist(), "names": names}

    def scores(self, features: Features) -> Iterator[Score]:
        labels, classes = self.test.labels, self.test.classes
        for view in VIEWS:
            of_view = features.images[view]
            if features.texts is not None and "clip" in of_view:
                similarity = of_view["clip"] @ class_embeddings(features.texts, len(PLAIN)).T
                ranks = rank_of(similarity, torch.from_numpy(labels))
                answer_names = [classes[place] for place in similarity.argmax(dim=1).tolist()]
                yield Score(f"{view}, text top1", hits(ranks, 1), self.test.owners, answer_names, view)
                if len(classes) > 5:
                    yield Score(f"{view}, text top5", hits(ranks, 5), self.test.owners)
            if self.train is not None:
                train = features.images[f"train {view}"]["pooled"].numpy()
                right, answers, strength = linear_probe(train, self.train.labels, of_view["pooled"].numpy(), labels)
                answer_names = [classes[place] for place in answers]
                yield Score(f"{view}, probe", right, self.test.owners, answer_names, view, {"C": strength})


class ListedCategory(ForeignRecord):
    """Category of a COCO file."""

    id: Number
    name: str


class ListedBox(ForeignRecord):
    """Annotation of a COCO file."""

    id: Number
    image_id: Number
    category_id: Number
    bbox: Annotated[list[Finite], Field(min_length=4, max_length=4)]
    iscrowd: bool | Literal[0, 1] = 0


class InstancesFile(ForeignRecord):
    """COCO's instances_*.json."""

    images: list[ListedImage]
    annotations: list[ListedBox]
    categories: list[ListedCategory]


def read_objects(instances: Path, images: Path) -> ObjectSet:
    """Every box of a COCO-format file that is no crowd and at least SMALLEST pixels wide and high.

    Raises:
        ValueError: a file that is not COCO's, names what is not there, or has no such box.
    """
    content = read_record(instances, InstancesFile, " It is not in COCO's instances format")
    names = {category.id: category.name for category in content.categories}
    place = {image.id: number for number, image in enumerate(content.images)}
    classes = tuple(names.values())
    if len(set(classes)) < len(classes):
        raise ValueError(f"{instances}: two categories have the same name: no text can tell them apart")
    numbers = {category: number for number, category in enumerate(names)}
    boxes: list[tuple[int, Box, int]] = []
    for annotation in content.annotations:
        image, category = annotation.image_id, annotation.category_id
        if image not in place or category not in names:
            raise ValueError(
                f"{instances}: annotation {annotation.id} has image {image} or category {category} of no list"
            )
        x, y, width, height = annotation.bbox
        if not annotation.iscrowd and min(width, height) >= SMALLEST:
            boxes.append((place[image], (x, y, width, height), numbers[category]))
    if not boxes:
        raise ValueError(f"{instances} has no box of at least {SMALLEST:g} x {SMALLEST:g} pixels that is no crowd")
    boxes.sort(key=lambda entry: entry[0])  # neighbours share their image
    used = sorted({number for number, _, _ in boxes})
    files = [images / checked_name(content.images[number].file_name, instances, folders=True) for number in used]
    pictures = from_files(files, images)
    # Boxes of an image follow each other, also where threads share them: it is decoded once.
    pictures = replace(pictures, read=lru_cache(maxsize=_KEPT)(pictures.read))
    position = {number: order for order, number in enumerate(used)}
    owners = np.array([position[number] for number, _, _ in boxes], dtype=np.int64)
    labelled = [
        f"{pictures.names[owner]} {[round(v) for v in box]}" for owner, (_, box, _) in zip(owners, boxes, strict=True)
    ]
    base = chosen(pictures, owners.tolist(), labelled)
    settings = str([box for _, box, _ in boxes])
    views = {
        "crop": changed(base, lambda number, image: crop(image, boxes[number][1]), f"crop {MARGIN} {settings}"),
        "marked": changed(base, lambda number, image: mark(image, boxes[number][1]), f"marked {_FRAME} {settings}"),
    }
    return ObjectSet(views, np.array([label for _, _, label in boxes], dtype=np.int64), owners, classes)


def read_train_and_test(source: str, split: str | None, train: str | None) -> tuple[ObjectSet | None, ObjectSet]:
    """(boxes to train a probe on, or None without a training split; boxes to test).

    Args:
        source: a COCO tree (`<split>2017/`, `annotations/instances_<split>2017.json`), or `FILE.json:IMAGES`.
        split, train: of a tree; by default `val` and, where it is there, `train`.

    Raises:
        ValueError: as `read_objects`; also where the two splits have other categories.
    """
    file, colon, folder = source.rpartition(":")
    if colon and file.endswith(".json"):
        return None, read_objects(Path(file), Path(folder))
    root, held = Path(source), split or "val"
    if train is None and not (root / "annotations/instances_train2017.json").is_file():
        return None, _of_tree(root, held)
    check_apart(source, train or "train", held)
    test, learnt = _of_tree(root, held), _of_tree(root, train or "train")
    if set(learnt.classes) != set(test.classes):
        lone = sorted(set(learnt.classes) ^ set(test.classes))
        raise ValueError(f"{source}: the splits have other categories: {', '.join(lone[:5])}")
    order = np.array([test.classes.index(name) for name in learnt.classes], dtype=np.int64)
    return replace(learnt, labels=order[learnt.labels], classes=test.classes), test


def _of_tree(root: Path, split: str) -> ObjectSet:
    instances, images = root / f"annotations/instances_{split}2017.json", root / f"{split}2017"
    for path in (instances, images):
        if not path.exists():
            raise ValueError(f"{path} is not there: give a COCO tree, or FILE.json:IMAGES for another COCO-format file")
    return read_objects(instances, images)


def crop(image: Image.Image, box: Box) -> Image.Image:
    """The square of MARGIN times the longer side around a box."""
    x, y, width, height = box
    side = max(1, round(MARGIN * max(width, height)))
    left, top = round(x + width / 2 - side / 2), round(y + height / 2 - side / 2)
    canvas = Image.new("RGB", (side, side), _GREY)
    inside = (max(left, 0), max(top, 0), min(left + side, image.width), min(top + side, image.height))
    if inside[0] < inside[2] and inside[1] < inside[3]:
        canvas.paste(image.crop(inside), (inside[0] - left, inside[1] - top))
    return canvas


def mark(image: Image.Image, box: Box) -> Image.Image:
    """The image in the middle of a square, with a frame just outside of the box."""
    side = max(image.size)
    left, top = (side - image.width) // 2, (side - image.height) // 2
    canvas = Image.new("RGB", (side, side), _GREY)
    canvas.paste(image, (left, top))
    line = max(2, round(_FRAME * side))
    x, y, width, height = box
    corners = (left + x - line, top + y - line, left + x + width + line, top + y + height + line)
    ImageDraw.Draw(canvas).rectangle([round(value) for value in corners], outline=_RED, width=line)
    return canvas
