"""Segmentation by frozen feature maps: in context, by a linear head, and what the outlined objects are.

    in-context mIoU  by the nearest patches of training images, `in_context`
    linear mIoU      BatchNorm and a 1 x 1 convolution, `heads`
    objects kNN      features averaged over an object's outline, the 20 nearest vote with exp(cosine / 0.07)

mIoU is the mean over classes of intersection over union, both summed over the images, at the labels' own size; pixels
without a class count nowhere.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import chain, groupby

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision import tv_tensors
from torchvision.transforms import v2 as transforms

from visft_ds.evals.judge import in_context
from visft_ds.evals.judge.dense_sets import DenseSet
from visft_ds.evals.judge.heads import cross_entropy, enlarged
from visft_ds.evals.judge.in_context import recall
from visft_ds.evals.judge.probes import Rows, by_neighbours
from visft_ds.evals.judge.protocol import Benchmark, FloatArray, Label, Score, mean_ratio
from visft_ds.evals.judge.protocols import Protocol, probe
from visft_ds.evals.judge.sources import SIDE, Kept, Sight
from visft_ds.tasks.classes import VOID
from visft_ds.tasks.pictures import Picture, grid, palette, side_by_side

IN_CONTEXT, LINEAR, OBJECTS = "in-context mIoU", "linear mIoU", "objects kNN"
_GREY = (124, 116, 104)  # about the mean of a model's normalisation
_KEPT = 112  # pixels of the side of a segmentation that is kept for the sheet


def segmentation(label: str, train: DenseSet, test: DenseSet, protocol: Protocol) -> Benchmark:
    """In-context and linear mIoU and, where objects are known, their kNN."""
    numbers = (IN_CONTEXT, LINEAR, *([OBJECTS] if test.things and train.things else []))
    found = probe(label, "segmentation 1", numbers, train, test, protocol, _scores)
    return replace(found, sheet=partial(segmentation_sheet, test))


def _scores(source: Kept | Sight, wanted: Collection[str], protocol: Protocol) -> Iterator[Score]:
    train, test, recipe = source.train, source.test, protocol.segmentation
    if IN_CONTEXT in wanted:
        memory = source.memory(protocol.memory, _cropped)
        draws = in_context.RESAMPLES * source.resampled
        seen = chain.from_iterable(recall(memory, maps, draws) for maps in source.whole(test))
        yield overlapping(IN_CONTEXT, seen, test)
    if LINEAR in wanted:
        fitted = source.heads(len(train.classes), cross_entropy(recipe.stride), recipe, _distorted)
        with torch.no_grad():
            yield overlapping(LINEAR, source.said(fitted, in_windows=True), test)
    if OBJECTS in wanted:
        known, asked = (
            Rows(
                pooled(chain.from_iterable(source.whole(data)), data),
                np.array([thing.label for thing in data.things]),
                np.array([thing.owner for thing in data.things]),
            )
            for data in (train, test)
        )
        yield by_neighbours(OBJECTS, known, asked)


def _cropped(side: int) -> transforms.Compose:
    jitter = transforms.RandomApply([transforms.ColorJitter(0.1, 0.1, 0.1, 0.1)], 0.5)
    return transforms.Compose([transforms.RandomResizedCrop(side, (0.5, 2.0)), jitter])


def _distorted(side: int) -> transforms.Compose:
    return transforms.Compose(
        [
            transforms.RandomResize(side // 2, side * 2),
            transforms.RandomCrop(side, pad_if_needed=True, fill={tv_tensors.Mask: VOID, "others": _GREY}),
            transforms.RandomHorizontalFlip(),
            transforms.RandomPhotometricDistort(),
        ]
    )


def overlapping(name: str, seen: Iterable[Tensor], test: DenseSet) -> Score:
    """Score of what is seen in each test image, (1 + resamples, classes, h, w), the largest of a place its class."""
    found, maps, classes = [], [], len(test.classes)
    for place, one in enumerate(seen):
        label = torch.from_numpy(test.label(place)).to(one.device).long()
        # Three times as fast as argmax.
        said = enlarged(one, (label.shape[0], label.shape[1])).max(dim=1).indices
        known = label != VOID
        pairs = said[:, known] + classes * label[known] + classes**2 * torch.arange(len(said)).to(label.device)[:, None]
        counts = torch.bincount(pairs.flatten(), minlength=len(said) * classes**2).view(-1, classes, classes)
        both = counts.diagonal(dim1=1, dim2=2)
        found.append(torch.stack([both, counts.sum(dim=1) + counts.sum(dim=2) - both], dim=1).cpu())
        maps.append(F.interpolate(said[:1, None].float(), (_KEPT, _KEPT), mode="nearest-exact")[0, 0].cpu())
    values = torch.stack(found, dim=1).double().numpy()
    retrained = mean_ratio(values[1:].sum(axis=1))
    return Score(name, values[0], maps=torch.stack(maps).to(torch.int16).numpy(), retrained=retrained)


def pooled(maps: Iterable[Tensor], of: DenseSet) -> Tensor:
    """(objects, D), the mean of each object's part of the map (D, h, w) of its image."""
    things = {owner: list(own) for owner, own in groupby(of.things, key=lambda thing: thing.owner)}
    found = []
    for place, one in enumerate(maps):
        for thing in things.get(place, ()):
            share = F.interpolate(torch.from_numpy(thing.mask)[None, None].float(), one.shape[-2:], mode="area")
            found.append((one.cpu() * share[0]).sum(dim=(1, 2)) / share.sum())
    return torch.stack(found)


def segmentation_sheet(test: DenseSet, scores: Mapping[str, Score], count: int) -> Picture:
    """Images whose segmentation the last of several models changes most against the first, whichever way, each beside
    what is there and what each model sees.

    The number above is the overlap in percent, over all classes (of objects, those) together: a few stray pixels of
    another class would halve a mean over the classes of one image.

    Args:
        scores: model -> its score with maps.
    """
    empty = int(test.classes[0] == "")
    each = {label: _overlap(score.values[..., empty:]) for label, score in scores.items()}
    first, last = next(iter(each.values())), list(each.values())[-1]
    chosen = np.argsort(-abs(last - first), kind="stable")[:count].tolist()
    colours = palette([str(number) for number in range(empty, VOID)])
    table = np.full((VOID + 1, 3), 255, dtype=np.uint8)
    table[empty:VOID] = list(colours.values())
    rows = []
    for place in chosen:
        image = np.asarray(test.images.read(place).resize((SIDE, SIDE)))
        seen = {"what is there": test.label(place)}
        for label, score in scores.items():
            assert score.maps is not None, label
            seen[f"{label}: {100 * each[label][place]:.0f}"] = score.maps[place].astype(np.uint8)
        painted = [(_painted(image, classes, table), title) for title, classes in seen.items()]
        rows.append(side_by_side((image, "picture"), *painted))
    return grid(rows)


def _overlap(values: FloatArray) -> FloatArray:
    """(images,) of (images, 2, classes): intersections of all classes by their unions."""
    above, below = values.sum(axis=2).T
    overlap: FloatArray = above / np.maximum(below, 1)
    return overlap


def _painted(image: Picture, classes: Label, table: Picture) -> Picture:
    """An image under the colours of its classes; where there is none, pale."""
    colours = table[np.asarray(Image.fromarray(classes).resize((SIDE, SIDE), Image.Resampling.NEAREST))]
    pale = (colours == 255).all(axis=2, keepdims=True)
    painted: Picture = np.where(pale, 0.35 * image + 0.65 * colours, 0.25 * image + 0.75 * colours).astype(np.uint8)
    return painted
