"""Nearest neighbours and logistic regression: whose class are patches, images and objects by frozen features?

In context, with nothing trained, a patch takes its classes from the most similar patches of training images.
Hummingbird's dense retrieval (https://arxiv.org/abs/2306.01667), as https://github.com/vpariza/open-hummingbird-eval
runs it: a patch in memory has the shares of the classes among its pixels; the 30 nearest by cosine count by
softmax(similarity / 0.02). Pixels without a class have a share in none, and patches without any other are not kept.

Images vote as in DINO (https://arxiv.org/abs/2104.14294, 4.1): the 20 nearest by cosine, each with
exp(similarity / 0.07). Logistic regression reads the class token beside the mean of the patches, as DINOv2's linear
classifier does (one of the two where a model has no other), centred and divided by one number for all channels; its
strength of regularisation is the best of STRENGTHS on a fifth of the training images, which it then learns as well.

Of an object the model sees a square around its box, the longer side times MARGIN (what lies outside of the image is
grey), and answers by text (the category whose sentence is nearest, if it has a text side) and by logistic regression.
The protocol of the ViSFT paper is not known to us; this one is ours.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

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
from visft_ds.evals.judge.protocol import (
    PLAIN,
    Benchmark,
    Features,
    FloatArray,
    ImageSet,
    Label,
    Score,
    hits,
    rank_by_text,
    rank_of,
    resamples,
    sentences,
)
from visft_ds.monitor.console import gauge
from visft_ds.tasks.classes import VOID

IN_CONTEXT, KNN = (30, 0.02), (20, 0.07)  #: neighbours, temperature
RESAMPLES = 10  #: of the training images, by neighbours
ROWS = 1024  #: queries that are compared at once
_BANK = 2**20  # that they are compared with at once
_SEARCHED = 4  # times as many neighbours: so many remain when some images are not drawn
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)  #: scikit-learn's C
_FEW = 1.0  # the strength where no class has images to spare
_STEPS = 5000
_SMALL = 2**23  # numbers
MARGIN = 1.2
SMALLEST = 16.0  #: sides of a box below which nobody could recognise it, pixels
_GREY = (128, 128, 128)


@dataclass(frozen=True)
class Rows:
    """Features with labels."""

    features: Tensor  #: (n, D)
    labels: Tensor  #: (n,), numbers of classes; or (n, C), shares of them
    owners: Tensor  #: (n,), numbers of the images that they are of

    def part(self, places: Tensor) -> Rows:
        """Some of them, by number or by a mask."""
        return Rows(self.features[places], self.labels[places], self.owners[places])


def remember(images: Iterable[tuple[int, Tensor, Label]], classes: int, each: int) -> Rows:
    """Keep at most `each` patches of every image: those of classes that are rare in it, at random among equals.

    Args:
        images: (number of the image, its map (D, h, w), its label of any size).
    """
    features, labels, owners = [], [], []
    for number, patches, label in images:
        shares = shares_of(label, patches.shape[-2:], classes)
        frequency = (shares > 0) @ (shares > 0).sum(axis=0)
        order = np.argsort(frequency * np.random.default_rng([0, number]).random(len(shares)), kind="stable")
        kept = torch.from_numpy(order[frequency[order] > 0][:each])
        features.append(F.normalize(patches.flatten(1).T[kept.to(patches.device)], dim=1))
        labels.append(torch.from_numpy(shares)[kept].to(features[-1]))
        owners.append(torch.full((len(kept),), number))
    return Rows(torch.cat(features), torch.cat(labels), torch.cat(owners).to(features[0].device))


def shares_of(label: Label, grid: Sequence[int], classes: int) -> FloatArray:
    """(h * w, classes), the share of each class among the pixels of each patch; a pixel belongs to one patch."""
    rows, columns = (np.arange(size) * cells // size for size, cells in zip(label.shape, grid, strict=True))
    places = (rows[:, None] * grid[1] + columns) * (VOID + 1) + label
    counts = np.bincount(places.ravel(), minlength=grid[0] * grid[1] * (VOID + 1)).reshape(-1, VOID + 1)
    shares: FloatArray = counts[:, :classes] / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    return shares


def recall(memory: Rows, maps: Tensor, draws: int = RESAMPLES) -> Iterator[Tensor]:
    """For each image of (n, D, h, w): (1 + draws, C, h, w), what its patches are by the memory and by resamples."""
    for images in maps.split(max(1, ROWS // maps[0, 0].numel())):
        queries = images.flatten(2).transpose(1, 2).flatten(0, 1)
        votes = vote(memory, queries, *IN_CONTEXT, draws)
        yield from votes.unflatten(1, (len(images), *maps.shape[-2:])).permute(1, 0, 4, 2, 3)


def vote(memory: Rows, queries: Tensor, neighbours: int, temperature: float, draws: int = RESAMPLES) -> Tensor:
    """(1 + draws, n, C): mean labels of the rows nearest to (n, D), each by exp(cosine / temperature), and the same by
    bootstraps of the training images. These need no search of their own: a row counts as often as its image is drawn.

    Args:
        memory: rows of length 1.
    """
    copies = torch.from_numpy(resamples(int(memory.owners.max()) + 1, draws))
    part, count = F.normalize(queries.to(memory.features), dim=1), _SEARCHED * neighbours if draws else neighbours
    found = []
    for start in range(0, len(memory.features), _BANK):
        bank = memory.features[start : start + _BANK]
        near, places = (part @ bank.T).topk(min(count, len(bank)), dim=1)
        found.append((near, places + start))
    similarity, places = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
    similarity, order = similarity.topk(min(count, len(memory.features)), dim=1)
    places = places.gather(1, order)
    # Copies of a patch are equally near: as many count as there is room for.
    room = copies.to(places.device)[:, memory.owners[places]].cumsum(dim=2).clamp(max=neighbours)
    taken = room.diff(dim=2, prepend=torch.zeros_like(room[..., :1]))
    weights = taken * ((similarity - similarity[:, :1]) / temperature).exp()
    weights = weights / weights.sum(dim=2, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
    if memory.labels.ndim == 2:
        return torch.einsum("rnk,nkc->rnc", weights, memory.labels[places])
    votes = weights.new_zeros(*weights.shape[:2], int(memory.labels.max()) + 1)
    return votes.scatter_add(2, memory.labels[places].expand_as(weights), weights)


def classification(label: str, train: ClassSet, test: ClassSet) -> Benchmark:
    """kNN and linear accuracy."""
    probes = {"kNN": by_neighbours, "linear": by_regression}

    def rows(number: str, features: Mapping[str, Tensor], data: ClassSet) -> Rows:
        kinds = ("pooled",) if number == "kNN" else ("pooled", "mean")
        found = torch.cat([features[kind] for kind in kinds if kind in features], dim=1)
        return Rows(found, torch.from_numpy(data.labels), torch.arange(len(data.labels)))

    def scores(features: Features, wanted: Collection[str]) -> Iterator[Score]:
        for name in wanted:
            known, asked = rows(name, features["train"], train), rows(name, features["test"], test)
            yield probes[name](name, known, asked)

    def held_out(features: Mapping[str, Tensor], number: str) -> float:
        known = rows(number, features, train)
        held = _held(known.labels)
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
            right = asked.labels.numpy() - test.classes.count("")
            ranks = rank_by_text(features["test"]["clip"], features["texts"]["clip"], len(PLAIN), right)
            yield Score("text top1", hits(ranks, 1), asked.owners.numpy())
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


def rows_of(features: Tensor, things: Sequence[Thing]) -> Rows:
    """Objects as rows."""
    return Rows(features, torch.tensor([one.label for one in things]), torch.tensor([one.owner for one in things]))


def by_neighbours(name: str, train: Rows, test: Rows, draws: int = RESAMPLES) -> Score:
    """1.0 for each row whose neighbours vote for its class alone."""
    memory, right = replace(train, features=F.normalize(train.features, dim=1)), []
    for part, there in zip(test.features.split(ROWS), test.labels.split(ROWS), strict=True):
        votes = vote(memory, part, *KNN, draws)
        votes = F.pad(votes, (0, max(0, int(test.labels.max()) + 1 - votes.shape[2])))  # classes that were not taught
        right.append(np.stack([hits(rank_of(one, there), 1) for one in votes]))
    found = np.concatenate(right, axis=1)
    return Score(name, found[0], test.owners.numpy(), retrained=found[1:].mean(axis=1))


def by_regression(name: str, train: Rows, test: Rows, draws: int = heads.RESAMPLES) -> Score:
    """1.0 for each row whose class logistic regression predicts."""
    held, strength = _held(train.labels), _FEW
    if held.any():
        rest, fifth = train.part(~held), train.part(held)
        tried = gauge("linear probe", len(STRENGTHS), "strengths", STRENGTHS)
        strength = STRENGTHS[int(np.argmax([_right(rest, fifth, one).mean() for one in tried]))]
    copies = torch.from_numpy(resamples(int(train.owners.max()) + 1, draws))[:, train.owners]
    drawn = [torch.arange(len(held)).repeat_interleave(of) for of in copies]
    found = np.stack([_right(train.part(places), test, strength) for places in drawn]).astype(np.float64)
    return Score(name, found[0], test.owners.numpy(), retrained=found[1:].mean(axis=1))


def _held(labels: Tensor) -> Tensor:
    """Every fifth image of a class; of a class of fewer than five none."""
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        held[(labels == label).nonzero()[4::5]] = True
    return held


def _right(train: Rows, test: Rows, strength: float) -> npt.NDArray[np.bool_]:
    """Mask of the rows (n,) whose class logistic regression predicts."""
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    known, asked, taught, wanted = (one.numpy() for one in (train.features, test.features, train.labels, test.labels))
    if len(np.unique(taught)) < 2:
        return wanted == taught[0]
    middle = known.mean(axis=0, dtype=np.float64)
    spread = math.sqrt(float(((known - middle) ** 2).mean())) or 1.0
    # Threads would spend more time on waiting than on products of small arrays.
    with threadpool_limits(1 if known.size < _SMALL else None, "blas"):
        model = LogisticRegression(C=strength, max_iter=_STEPS).fit((known - middle) / spread, taught)
    right: npt.NDArray[np.bool_] = model.predict((asked - middle) / spread) == wanted
    return right
