"""Dense probes of a frozen feature map: what it knows of places and objects, not of whole images.

    linear mIoU    logistic regression on features that are brought to the CELLS x CELLS grid by bilinear interpolation
                   (DINOv2, https://arxiv.org/abs/2304.07193, 7.4: linear segmentation)
    knn mIoU       each patch has the label of its 20 nearest patches of the training images, as in `probes`
    objects        features averaged over an object's outline (over its box where it has none): kNN, linear, and for
                   models with a text side the nearest sentence

mIoU is the mean over classes of intersection over union, summed over the images; bootstraps draw images.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from visft_ds.evals.judge.dense_sets import CELLS, VOID, DenseSet
from visft_ds.evals.judge.probes import (
    NEIGHBOURS,
    STRENGTHS,
    TEMPERATURE,
    fitted,
    linear_probe,
    nearest_neighbours,
    vote,
)
from visft_ds.evals.judge.protocol import (
    PLAIN,
    Benchmark,
    Features,
    FloatArray,
    IntArray,
    Score,
    hits,
    rank_by_text,
    sentences,
)
from visft_ds.tasks.pictures import Picture, grid, palette, side_by_side

PLACES = 20_000  #: that the linear segmentation learns from, drawn evenly from the images, the same for every model
PATCHES = 12_000  #: that patches are compared with
DECAY = 1e-3  #: weight of the squared length beside the mean loss
_STEPS = 1000
_SHOWN = 224  # pixels of a picture's side on a sheet


def dense(label: str, train: DenseSet, test: DenseSet) -> Benchmark:
    """Linear segmentation, patch kNN and, where objects are known, their names."""
    names, classes = list(test.names), max(train.classes, test.classes)

    def scores(features: Features, wanted: Collection[str]) -> Iterator[Score]:
        learnt, judged = (features[name]["patches"] for name in ("train", "test"))
        answers = segment_linearly(learnt, train.cells, judged)
        yield Score("linear mIoU", overlaps(answers, test.cells, classes), maps=answers.astype(np.int16))
        answers = segment_by_neighbours(learnt, train.cells, judged, classes)
        yield Score("knn mIoU", overlaps(answers, test.cells, classes))
        if not names:
            return
        known, asked = pooled(learnt, train), pooled(judged, test)
        right = nearest_neighbours(known, train.labels, asked, test.labels, len(names))
        yield Score("objects knn", right, test.owners)
        right = linear_probe(known.numpy(), train.labels, asked.numpy(), test.labels)
        yield Score("objects linear", right, test.owners)
        if "texts" in features and "clip_patches" in features["test"]:
            embeddings = F.normalize(pooled(features["test"]["clip_patches"], test), dim=1)
            ranks = rank_by_text(embeddings, features["texts"]["clip"], len(PLAIN), test.labels)
            yield Score("objects text", hits(ranks, 1), test.owners)

    protocol = [CELLS, PLACES, PATCHES, DECAY, NEIGHBOURS, TEMPERATURE, STRENGTHS]
    return Benchmark(
        label,
        {"train": train.images, "test": test.images},
        ("patches", "clip_patches"),
        ("linear mIoU", "knn mIoU", *(("objects knn", "objects linear", "objects text") if names else ())),
        {"benchmark": "dense 2", "protocol": protocol, "truths": [train.truth, test.truth], "names": names},
        scores,
        texts=sentences(names, PLAIN),
        sheet=partial(segmentation_sheet, test, classes),
    )


def overlaps(answers: IntArray, cells: np.ndarray[Any, Any], classes: int) -> FloatArray:
    """(images, 2, classes): cells in which answer and truth are a class, and cells in which one of the two is."""
    known = cells != VOID
    found = np.zeros((len(cells), 2, classes))
    for number in range(classes):
        answer, truth = known & (answers == number), cells == number
        found[:, 0, number] = (answer & truth).sum(axis=(1, 2))
        found[:, 1, number] = (answer | truth).sum(axis=(1, 2))
    return found


def segment_linearly(train: Tensor, cells: np.ndarray[Any, Any], test: Tensor) -> IntArray:
    """(images, CELLS, CELLS), the class of each cell of the test images.

    Args:
        train, test: (images, D, h, w).
        cells: (images, CELLS, CELLS), classes of the training images.
    """
    each = max(1, min(CELLS * CELLS, PLACES // len(train)))
    chosen, labels = [], []
    for number, image in enumerate(train):
        known = np.flatnonzero(cells[number].ravel() != VOID)
        drawn = np.random.default_rng([0, number]).permutation(known)[:each]
        chosen.append(to_cells(image[None])[0].flatten(1).T[torch.from_numpy(drawn)])
        labels.append(cells[number].ravel()[drawn])
    features, truth = torch.cat(chosen).numpy(), np.concatenate(labels)
    middle = features.mean(axis=0, dtype=np.float64).astype(np.float32)
    spread = math.sqrt(float(((features - middle) ** 2).mean())) or 1.0
    model = fitted((features - middle) / spread, truth, 1 / (DECAY * len(truth)), _STEPS)
    weight, bias = torch.from_numpy(model.coef_).float(), torch.from_numpy(model.intercept_).float()
    if len(model.classes_) == 2:  # scikit-learn keeps the second one's alone
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    said = []
    for image in test:
        # Interpolation and a linear map may change places: first the map, which leaves fewer channels.
        scaled = (image - torch.from_numpy(middle)[:, None, None]) / spread
        logits = torch.einsum("cd,dhw->chw", weight, scaled) + bias[:, None, None]
        said.append(to_cells(logits[None])[0].argmax(dim=0).numpy())
    classes: IntArray = model.classes_.astype(np.int64)
    return classes[np.stack(said)]


def segment_by_neighbours(train: Tensor, cells: np.ndarray[Any, Any], test: Tensor, classes: int) -> IntArray:
    """(images, CELLS, CELLS), the class that most similar patches of the training images have; arguments as above."""
    height, width = train.shape[-2:]
    labels = _labels_of_patches(cells, classes, height, width)
    known = np.flatnonzero(labels != VOID)
    drawn = torch.from_numpy(np.random.default_rng(0).permutation(known)[:PATCHES])
    patches = train.permute(0, 2, 3, 1).flatten(0, 2)[drawn]
    voted = vote(patches, labels[drawn.numpy()], test.permute(0, 2, 3, 1).flatten(0, 2), classes).argmax(dim=1)
    said = voted.unflatten(0, (len(test), 1, height, width)).float()
    found: IntArray = F.interpolate(said, (CELLS, CELLS), mode="nearest-exact")[:, 0].long().numpy()
    return found


def _labels_of_patches(cells: np.ndarray[Any, Any], classes: int, height: int, width: int) -> IntArray:
    """(images * height * width,), the class that covers most of a patch; VOID where most of it is."""
    shares = [
        F.interpolate(torch.from_numpy(cells == number)[:, None].float(), (height, width), mode="area")[:, 0]
        for number in (*range(classes), VOID)
    ]
    most = torch.stack(shares).argmax(dim=0).flatten().numpy()
    labels: IntArray = np.where(most == classes, VOID, most)
    return labels


def segmentation_sheet(test: DenseSet, classes: int, scores: Mapping[str, Score], count: int) -> Picture | None:
    """Images whose segmentation the last of several models changes most against the first, whichever way (or that the
    only model has most wrong), each beside what is there and what each model sees; None without any.

    The number above is the overlap in percent, over all classes (of objects, those) together: a few stray cells of
    another class would halve a mean over the classes of one image.

    Args:
        scores: model -> its score with maps.
    """
    if not (scores and count):
        return None
    names = test.names
    each = {label: _overlap(score.values[..., int(bool(names)) :]) for label, score in scores.items()}
    first, last = next(iter(each.values())), list(each.values())[-1]
    chosen = np.argsort(-abs(last - first) if len(scores) > 1 else last, kind="stable")[:count].tolist()
    of_cells = ("", *names) if names else tuple(map(str, range(classes)))
    colours = np.array(list(palette([name for name in of_cells if name]).values()), dtype=np.uint8)
    rows = []
    for place in chosen:
        image = test.images.read(place).resize((_SHOWN, _SHOWN))
        seen = {"picture": None, "what is there": test.cells[place]}
        for label, score in scores.items():
            assert score.maps is not None, label
            seen[f"{label}: {100 * each[label][place]:.0f}"] = score.maps[place]
        panels = [(_painted(np.asarray(image), cells, colours, bool(names)), title) for title, cells in seen.items()]
        rows.append(side_by_side(*panels))
    return grid(rows)


def _overlap(values: FloatArray) -> FloatArray:
    """(images,) of (images, 2, classes): intersections of all classes by their unions."""
    above, below = values.sum(axis=2).T
    overlap: FloatArray = above / np.maximum(below, 1)
    return overlap


def _painted(
    image: Picture, cells: np.ndarray[Any, Any] | None, colours: np.ndarray[Any, Any], objects: bool
) -> Picture:
    """An image under the colours of its classes; of objects class 0 is what none of them covers, and stays as it is."""
    if cells is None:
        return image
    scale = _SHOWN // CELLS
    fine = cells.repeat(scale, axis=0).repeat(scale, axis=1)[..., None]
    painted = colours[np.maximum(fine[..., 0] - objects, 0)]
    pale = (image * 0.35 + 255 * 0.65).astype(np.uint8)
    mixed = (0.25 * image + 0.75 * painted).astype(np.uint8)
    return np.where(fine >= int(objects), mixed, pale)


def to_cells(maps: Tensor) -> Tensor:
    """(B, D, h, w) -> (B, D, CELLS, CELLS) by bilinear interpolation."""
    return F.interpolate(maps, (CELLS, CELLS), mode="bilinear", align_corners=False)


def pooled(maps: Tensor, of: DenseSet) -> Tensor:
    """(objects, D), the mean of each object's part of the map (images, D, h, w) of its image."""
    found = []
    for number, mask in zip(of.owners.tolist(), of.masks, strict=True):
        share = F.interpolate(torch.from_numpy(mask)[None, None].float(), maps.shape[-2:], mode="area")[0, 0]
        found.append((maps[number] * share).sum(dim=(1, 2)) / share.sum())
    return torch.stack(found)
