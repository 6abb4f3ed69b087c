"""Segmentation by frozen feature maps: in context, by a linear head, and what the outlined objects are.

    in-context mIoU  by the nearest patches of training images, `probes`
    linear mIoU      BatchNorm and a 1 x 1 convolution, `heads`
    objects kNN      features averaged over an object's outline, the 20 nearest vote with exp(cosine / 0.07)

mIoU is the mean over classes of intersection over union, both summed over the images, at the labels' own size; pixels
without a class count nowhere.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, groupby
from typing import Any

import numpy as np
import torch
from faster_coco_eval import mask as coco_mask  # pycocotools' own warns under NumPy 2
from torch import Tensor
from torch.nn import functional as F
from torchvision import tv_tensors
from torchvision.transforms import v2 as transforms

from visft_ds.evals.judge.dense_sets import DenseSet, Thing
from visft_ds.evals.judge.heads import cross_entropy
from visft_ds.evals.judge.probes import RESAMPLES, Rows, by_neighbours, recall, rows_of
from visft_ds.evals.judge.protocol import Benchmark, FloatArray, Score, mean_ratio
from visft_ds.evals.judge.protocols import SIDE, Protocol, Source, at_labels, probe, trained
from visft_ds.tasks.classes import VOID
from visft_ds.tasks.pictures import Picture, draw_objects, grid, palette, side_by_side

IN_CONTEXT, LINEAR, OBJECTS = "in-context mIoU", "linear mIoU", "objects kNN"
_GREY = (124, 116, 104)  # about the mean of a model's normalisation
_KEPT = 112  # pixels of the side of a segmentation that is kept for the sheet


def segmentation(label: str, train: DenseSet, test: DenseSet, protocol: Protocol) -> Benchmark:
    """In-context and linear mIoU and, where objects are known, their kNN."""
    numbers = (IN_CONTEXT, LINEAR, *([OBJECTS] if test.things and train.things else []))
    found = probe(label, "segmentation 1", numbers, train, test, protocol, _scores)
    return replace(found, sheet=partial(segmentation_sheet, test))


def _scores(source: Source, wanted: Collection[str]) -> Iterator[Score]:
    train, test, protocol = source.train, source.test, source.protocol
    if IN_CONTEXT in wanted:
        memory = source.memory(_cropped)
        seen = chain.from_iterable(recall(memory, maps, RESAMPLES * protocol.resampled) for maps in source.whole(test))
        yield overlapping(IN_CONTEXT, seen, test)
    if LINEAR in wanted:
        head = trained(source, len(train.classes), cross_entropy, protocol.segmentation, _distorted)
        yield overlapping(LINEAR, source.said(head, in_windows=True), test)
    if OBJECTS in wanted:
        known, asked = (pooled(chain.from_iterable(source.whole(data)), data.things) for data in (train, test))
        yield by_neighbours(OBJECTS, known, asked)


def _cropped(side: int, image: Tensor, label: Tensor) -> Any:
    jitter = transforms.RandomApply([transforms.ColorJitter(0.1, 0.1, 0.1, 0.1)], 0.5)
    return transforms.Compose([transforms.RandomResizedCrop(side, (0.5, 2.0)), jitter])(image, label)


def _distorted(side: int, image: Tensor, label: Tensor) -> Any:
    distorted = transforms.Compose(
        [
            transforms.RandomResize(side // 2, side * 2),
            transforms.RandomCrop(side, pad_if_needed=True, fill={tv_tensors.Mask: VOID, "others": _GREY}),
            transforms.RandomHorizontalFlip(),
            transforms.RandomPhotometricDistort(),
        ]
    )
    return distorted(image, label)


def overlapping(name: str, seen: Iterable[Tensor], test: DenseSet) -> Score:
    """Score of what is seen in each test image, (1 + resamples, classes, h, w), the largest of a place its class."""
    found, maps, classes = [], [], len(test.classes)
    for large, truth in at_labels(seen, test):
        said, label = large.max(dim=1).indices, truth.long()  # three times as fast as argmax
        known = label != VOID
        pairs = said[:, known] + classes * label[known] + classes**2 * torch.arange(len(said)).to(label.device)[:, None]
        counts = torch.bincount(pairs.flatten(), minlength=len(said) * classes**2).view(-1, classes, classes)
        both = counts.diagonal(dim1=1, dim2=2)
        found.append(torch.stack([both, counts.sum(dim=1) + counts.sum(dim=2) - both], dim=1).cpu())
        maps.append(F.interpolate(said[:1, None].float(), (_KEPT, _KEPT), mode="nearest-exact")[0, 0].cpu())
    values = torch.stack(found, dim=1).double().numpy()
    retrained = mean_ratio(values[1:].sum(axis=1))
    return Score(name, values[0], maps=torch.stack(maps).to(torch.int16).numpy(), retrained=retrained)


def pooled(maps: Iterable[Tensor], things: Sequence[Thing]) -> Rows:
    """Objects, each by the mean of its part of the map (D, h, w) of its image."""
    own = {owner: list(several) for owner, several in groupby(things, key=lambda thing: thing.owner)}
    found = []
    for place, one in enumerate(maps):
        for thing in own.get(place, ()):
            share = F.interpolate(
                torch.from_numpy(coco_mask.decode(thing.code))[None, None].float(), one.shape[-2:], mode="area"
            )
            found.append((one.cpu() * share[0]).sum(dim=(1, 2)) / share.sum())
    return rows_of(torch.stack(found), things)


def segmentation_sheet(test: DenseSet, scores: Mapping[str, Score], count: int) -> Picture:
    """Images beside what is there and what each model sees: `typical` ones by the change from the first of several
    models to the last.

    The number above is the overlap in percent, over all classes (of objects, those) together: a few stray pixels of
    another class would halve a mean over the classes of one image.

    Args:
        scores: model -> its score with maps.
    """
    empty, colours, rows = int(test.classes[0] == ""), palette(test.classes), []
    sums = {label: score.values[..., empty:].sum(axis=2) for label, score in scores.items()}
    each = {label: both[:, 0] / np.maximum(both[:, 1], 1) for label, both in sums.items()}
    first, *_, last = each.values()
    for place in typical(last - first, count):
        image, label = np.asarray(test.images.read(place)), test.label(place)
        seen, pale = {"what is there": label}, (0.35 * image + 165).astype(np.uint8)
        for model, score in scores.items():
            assert score.maps is not None, model
            seen[f"{model}: {100 * each[model][place]:.0f}"] = score.maps[place]
        panels = [(draw_objects(image, [], [], colours, masks=[], side=SIDE), "picture")]
        for title, classes in seen.items():
            there = [number for number, name in enumerate(test.classes) if name and (classes == number).any()]
            names, masks = [test.classes[number] for number in there], [classes == number for number in there]
            panels.append((draw_objects(pale, names, [""] * len(names), colours, masks=masks, side=SIDE), title))
        rows.append(side_by_side(*panels))
    return grid(rows)


def typical(changes: FloatArray, count: int) -> list[int]:
    """Places of at most so many items, from the worst change to the best, whose ranks are evenly spaced.

    Half of all changes lie on either side of the middle one. The items that change most would show more than the mean.
    """
    order = np.argsort(changes, kind="stable")
    count = min(count, len(order))
    ranks = (np.arange(count) + 0.5) * len(order) / count
    return [int(order[int(rank)]) for rank in ranks]
