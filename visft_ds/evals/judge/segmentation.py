"""Segmentation by frozen feature maps: in context, by a linear head, and what the outlined objects are.

    in-context mIoU  by the nearest patches of training images, `in_context`
    linear mIoU      BatchNorm and a 1 x 1 convolution, `heads`
    objects kNN      features averaged over an object's outline, the 20 nearest vote with exp(cosine / 0.07)

mIoU is the mean over classes of intersection over union, both summed over the images, at the labels' own size; pixels
without a class count nowhere.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import chain

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision import tv_tensors
from torchvision.transforms import v2 as transforms

from visft_ds.evals.judge import heads, in_context
from visft_ds.evals.judge.dense_sets import DenseSet, Thing
from visft_ds.evals.judge.encoders import Encoder
from visft_ds.evals.judge.heads import BATCH, Recipe, cross_entropy, enlarged, fit_to_features
from visft_ds.evals.judge.in_context import recall, remember
from visft_ds.evals.judge.probes import by_neighbours
from visft_ds.evals.judge.protocol import Benchmark, FloatArray, Label, Score, mean_ratio
from visft_ds.evals.judge.protocols import Protocol, probe
from visft_ds.evals.judge.published import Sight
from visft_ds.evals.judge.scoring import Settings
from visft_ds.monitor.console import gauge
from visft_ds.tasks.classes import VOID
from visft_ds.tasks.pictures import Picture, grid, palette, side_by_side

IN_CONTEXT, LINEAR, OBJECTS = "in-context mIoU", "linear mIoU", "objects kNN"
SIDE = 224  #: of a picture on a sheet, pixels
_KEPT = 112  # pixels of the side of a segmentation that is kept for the sheet
_PASSES = 2  # over the training images, for the published memory


def segmentation(label: str, train: DenseSet, test: DenseSet, protocol: Protocol) -> Benchmark:
    """In-context and linear mIoU and, where objects are known, their kNN."""
    numbers = (IN_CONTEXT, LINEAR, *([OBJECTS] if test.things and train.things else []))
    found = probe(label, "segmentation 1", numbers, train, test, protocol, _quick, _published)
    return replace(found, sheet=partial(segmentation_sheet, test))


def _quick(
    wanted: Collection[str],
    train: DenseSet,
    learnt: Tensor,
    test: DenseSet,
    judged: Tensor,
    protocol: Protocol,
    resampled: bool,
) -> Iterator[Score]:
    classes, recipe = len(train.classes), protocol.segmentation
    if IN_CONTEXT in wanted:
        images = ((place, one, train.label(place)) for place, one in enumerate(learnt))
        memory = remember(images, classes, max(1, protocol.memory // len(learnt)))
        yield overlapping(IN_CONTEXT, recall(memory, judged, in_context.RESAMPLES * resampled), test)
    if LINEAR in wanted:
        loss, draws = cross_entropy(recipe.stride), heads.RESAMPLES * resampled
        fitted = fit_to_features(learnt, train.label, classes, loss, recipe, draws)
        with torch.no_grad():
            yield overlapping(LINEAR, (one for part in judged.split(BATCH) for one in fitted(part)), test)
    if OBJECTS in wanted:
        yield _named(pooled(learnt, train), train, pooled(judged, test), test)


def _published(
    wanted: Collection[str],
    train: DenseSet,
    test: DenseSet,
    protocol: Protocol,
    encoder: Encoder,
    settings: Settings,
) -> Iterator[Score]:
    sight = Sight(encoder, settings)
    if IN_CONTEXT in wanted:
        yield overlapping(IN_CONTEXT, _recalled(sight, train, test, protocol.memory), test)
    if LINEAR in wanted:
        with torch.no_grad():
            yield overlapping(LINEAR, _labelled(sight, train, test, protocol.segmentation), test)
    if OBJECTS in wanted:
        known, asked = (pooled(chain.from_iterable(sight.whole(data.images)), data) for data in (train, test))
        yield _named(known, train, asked, test)


def _recalled(sight: Sight, train: DenseSet, test: DenseSet, most: int) -> Iterator[Tensor]:
    """What each test image is by a memory of augmented training images."""
    jitter = transforms.RandomApply([transforms.ColorJitter(0.1, 0.1, 0.1, 0.1)], 0.5)
    change = transforms.Compose([transforms.RandomResizedCrop(sight.side, (0.5, 2.0)), jitter])
    order = list(range(len(train.images))) * _PASSES
    channels, *grid = sight.see(torch.zeros(1, 3, sight.side, sight.side, dtype=torch.uint8)).shape[1:]
    sight.check_room(min(most, len(order) * math.prod(grid)) * (channels + len(train.classes)), IN_CONTEXT)

    def taught() -> Iterator[tuple[int, Tensor, Label]]:
        places = iter(gauge(IN_CONTEXT, len(order), "images", order))
        for maps, labels in sight.crops(train.images, train.label, order, sight.settings.batch_size, change):
            # Ten million patches in float32 would be too large for a GPU.
            for one, label in zip(maps.half() if maps.is_cuda else maps, labels.cpu().numpy(), strict=True):
                yield next(places), one, label

    memory = remember(taught(), len(train.classes), max(1, most // len(order)))
    for maps in sight.whole(test.images):
        yield from recall(memory, maps)


def _labelled(sight: Sight, train: DenseSet, test: DenseSet, recipe: Recipe) -> Iterator[Tensor]:
    """What each test image is by heads that are trained on augmented crops."""
    side, grey = sight.side, [round(255 * mean) for mean in sight.encoder.normalisation[0]]
    change = transforms.Compose(
        [
            transforms.RandomResize(side // 2, side * 2),
            transforms.RandomCrop(side, pad_if_needed=True, fill={tv_tensors.Mask: VOID, "others": grey}),
            transforms.RandomHorizontalFlip(),
            transforms.RandomPhotometricDistort(),
        ]
    )
    with torch.enable_grad():
        fitted = sight.fitted(
            train.images, train.label, change, len(train.classes), cross_entropy(recipe.stride), recipe
        )
    return sight.in_windows(test.images, lambda maps: enlarged(fitted(maps), (side, side)).softmax(dim=2))


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


def _named(known: Tensor, train: DenseSet, asked: Tensor, test: DenseSet) -> Score:
    """Score of naming the objects of test images (n, D) by those of the training images (m, D)."""
    labels, truth = (np.array([one.label for one in data.things], dtype=np.int64) for data in (train, test))
    owners, groups = (np.array([one.owner for one in data.things], dtype=np.int64) for data in (train, test))
    return replace(by_neighbours(OBJECTS, known, labels, asked, truth, owners), groups=groups)


def pooled(maps: Iterable[Tensor], of: DenseSet) -> Tensor:
    """(objects, D), the mean of each object's part of the map (D, h, w) of its image."""
    by_image: dict[int, list[Thing]] = {}
    for thing in of.things:
        by_image.setdefault(thing.owner, []).append(thing)
    found = []
    for place, one in enumerate(maps):
        for thing in by_image.get(place, ()):
            share = F.interpolate(torch.from_numpy(thing.mask)[None, None].float(), one.shape[-2:], mode="area")
            share = share[0, 0].to(one.device)
            found.append(((one * share).sum(dim=(1, 2)) / share.sum()).cpu())
    return torch.stack(found)


def segmentation_sheet(test: DenseSet, scores: Mapping[str, Score], count: int) -> Picture | None:
    """Images whose segmentation the last of several models changes most against the first, whichever way (or that the
    only model has most wrong), each beside what is there and what each model sees; None without any.

    The number above is the overlap in percent, over all classes (of objects, those) together: a few stray pixels of
    another class would halve a mean over the classes of one image.

    Args:
        scores: model -> its score with maps.
    """
    if not (scores and count):
        return None
    empty = int(test.classes[0] == "")
    each = {label: _overlap(score.values[..., empty:]) for label, score in scores.items()}
    first, last = next(iter(each.values())), list(each.values())[-1]
    chosen = np.argsort(-abs(last - first) if len(scores) > 1 else last, kind="stable")[:count].tolist()
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
