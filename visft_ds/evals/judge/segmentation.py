"""Segmentation by frozen feature maps: in context, by a linear head, and what the outlined objects are.

    in-context mIoU  by the nearest patches of training images, `in_context`
    linear mIoU      BatchNorm and a 1 x 1 convolution, `linear_segmentation`
    objects kNN      features averaged over an object's outline, the 20 nearest vote with exp(cosine / 0.07)

mIoU is the mean over classes of intersection over union, both summed over the images, at the labels' own size
(published in-context: at the images'); pixels without a class count nowhere. Resamples of the training images
are judged on every _STRIDE-th pixel of every _STRIDE-th row: only their spread is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, groupby

import numpy as np
import torch
from faster_coco_eval import mask as coco_mask  # pycocotools' own warns under NumPy 2
from torch import Tensor
from torch.nn import functional as F

from visft_ds.evals.judge import in_context, linear_segmentation
from visft_ds.evals.judge.benchmark import Benchmark, FloatArray, Number, Score, mean_ratio
from visft_ds.evals.judge.crops import NO_CLASS, label_of
from visft_ds.evals.judge.dense_probes import LiveFeatures, Source, probe, trained
from visft_ds.evals.judge.dense_sets import DenseSet, Thing
from visft_ds.evals.judge.heads import BATCH, enlarged
from visft_ds.evals.judge.neighbours import RESAMPLES, Rows, by_neighbours
from visft_ds.evals.judge.protocol import NORMALISED, QUICK, SIZES, Protocol
from visft_ds.monitor.console import gauge
from visft_ds.tasks.pictures import Picture, draw_objects, grid, palette, side_by_side

IN_CONTEXT = Number(
    "in-context mIoU",
    how="Nothing is trained: a patch takes the classes of the 30 training patches nearest by cosine, weighted by "
    "softmax(similarity / 0.02).",
    published="Two augmented passes at 512 pixels (504 for patches of 14) fill a memory of at most 10,240,000 "
    "patches, in which pixels without a class are class 0. Judged at 512 pixels, after a one-to-one matching of "
    "answers and classes; a class that does not occur counts as 0.",
    quick=f"Memory holds at most {QUICK.memory:,} patches. {SIZES}",
    source="https://github.com/vpariza/open-hummingbird-eval",
    differs=f"{NORMALISED}; search is exact (there quantised); all images take part (there not the last "
    "incomplete batch); ADE20k has 150 classes (there 151, with one for pixels without a class)",
    chooses_layer=True,
)
LINEAR = Number(
    "linear mIoU",
    how="Batch normalisation and a linear layer on patches, by AdamW at 1e-3.",
    published="40,000 steps of 16 augmented crops of 512 pixels; judged in windows of 512 pixels, 341 apart, at "
    "the label's size.",
    quick=f"{QUICK.segmentation.steps:,} steps of {BATCH} images. {SIZES}",
    source="https://github.com/facebookresearch/dinov3, eval/segmentation",
    differs=f"{NORMALISED}; 504 pixels and windows 336 apart for patches of 14; the last iterate is judged (there "
    "the best of eight evaluations on the test images)",
    chooses_layer=True,
    trained=True,
    crops=linear_segmentation.RECIPE.steps * BATCH,
)
OBJECTS = Number("objects kNN", how="The 20 objects nearest by the mean of their patches name an object.")
NUMBERS = (IN_CONTEXT, LINEAR, OBJECTS)
SIDE = 224  #: pixels of a panel of the sheet
_KEPT = 112  # pixels of the side of a segmentation that is kept for the sheet
_STRIDE = 4  # between the pixels that resamples are judged on


def segmentation(label: str, train: DenseSet, test: DenseSet, protocol: Protocol) -> Benchmark:
    """In-context and linear mIoU and, where objects are known, their kNN."""
    numbers = NUMBERS if test.things and train.things else (IN_CONTEXT, LINEAR)
    benchmark = probe(label, "segmentation 2", numbers, train, test, protocol, _scores)
    return replace(benchmark, sheet=partial(segmentation_sheet, test))


def _scores(source: Source, wanted: Collection[str]) -> Iterator[Score]:
    if IN_CONTEXT.name in wanted:
        yield _in_context(source)
    if LINEAR.name in wanted:
        classes, recipe = len(source.train.classes), source.protocol.segmentation
        heads = trained(
            source,
            classes,
            linear_segmentation.cross_entropy,
            recipe,
            linear_segmentation.crop,
            linear_segmentation.schedule,
        )
        yield overlapping(LINEAR.name, source.in_windows(heads), partial(label_of, source.test), classes)
    if OBJECTS.name in wanted:
        known, asked = (
            pooled(chain.from_iterable(source.whole(data)), data.things)
            for data in (source.train, source.test)
        )
        yield by_neighbours(OBJECTS.name, _drawn_together(known, source.train), asked)


def _drawn_together(known: Rows, train: DenseSet) -> Rows:
    """Rows of training images, which belong to the groups that these come from, if there are such."""
    groups = train.images.groups
    return (
        known
        if groups is None
        else replace(known, owners=torch.from_numpy(groups).to(known.owners)[known.owners])
    )


def _in_context(source: Source) -> Score:
    """Nothing is trained. As published: pixels without a class teach class 0, labels have the size of the
    images.
    """
    classes, published = len(source.train.classes), isinstance(source, LiveFeatures)
    count, images = source.remembered(in_context.crop, in_context.PASSES)
    if published:
        images = ((number, maps, label.clamp(min=0)) for number, maps, label in images)
    each = max(1, source.protocol.memory // count)
    memory = in_context.remember(gauge("in-context memory", count, "images", images), classes, count, each)
    memory = _drawn_together(memory, source.train)
    draws = RESAMPLES * source.protocol.resampled
    seen = chain.from_iterable(in_context.recall(memory, maps, draws) for maps in source.whole(source.test))

    def label(number: int) -> Tensor:
        own = label_of(source.test, number)
        if not isinstance(source, LiveFeatures):
            return own
        side = source.encoder.side
        return F.interpolate(own[None, None].float(), (side, side), mode="nearest")[0, 0].long()

    return overlapping(IN_CONTEXT.name, seen, label, classes, matched=published)


def overlapping(
    name: str, seen: Iterable[Tensor], label: Callable[[int], Tensor], classes: int, *, matched: bool = False
) -> Score:
    """Score of what is seen in each test image, (1 + resamples, classes, h, w), the largest of a pixel its
    class.

    Args:
        label: number of an image -> (H, W) class numbers, or NO_CLASS.
        matched: answers are matched with classes by `in_context.matching`, and a class that is nowhere counts
        as 0.
    """
    total: Tensor | None = None  # (1 + resamples, classes, classes) pixels by answer and class
    counted, maps = [], []
    for number, outputs in enumerate(seen):
        truth = label(number).to(outputs.device)
        answers = largest(outputs[:1], truth.shape)
        counts = [confusion(answers, truth, classes)]
        if len(outputs) > 1:
            sparse = truth[::_STRIDE, ::_STRIDE]
            counts.append(confusion(largest(outputs[1:], truth.shape, _STRIDE), sparse, classes))
        both = torch.cat(counts).cpu()
        total = both if total is None else total.add_(both)
        counted.append(both[0].to_sparse() if matched else _ratios(both[0]))
        maps.append(
            F.interpolate(answers[:1, None].float(), (_KEPT, _KEPT), mode="nearest-exact")[0, 0].cpu()
        )
    assert total is not None
    kept = torch.stack(maps).to(torch.int16).numpy()
    if matched:
        orders = [torch.from_numpy(in_context.matching(counts)) for counts in total]
        total = torch.stack([_renamed(counts, order) for counts, order in zip(total, orders, strict=True)])
        counted = [_ratios(_renamed(counts.to_dense(), orders[0])) for counts in counted]
        kept = orders[0].numpy()[kept].astype(np.int16)
    values = torch.stack(counted).double().numpy()
    sums = _ratios(total).double().numpy()
    if matched:
        nowhere = sums[0, 1] == 0
        values[:, 1, nowhere] = 1
        sums[:, 1][sums[:, 1] == 0] = 1
    return Score(name, values, maps=kept, retrained=mean_ratio(sums[1:]))


def _renamed(counts: Tensor, order: Tensor) -> Tensor:
    """Counts (answers, classes) whose answer a stands for class order[a]."""
    return torch.zeros_like(counts).index_copy_(0, order, counts)


def _ratios(counts: Tensor) -> Tensor:
    """(..., 2, classes), intersection and union of each class, of counts (..., answers, classes)."""
    both = counts.diagonal(dim1=-2, dim2=-1)
    return torch.stack([both, counts.sum(dim=-2) + counts.sum(dim=-1) - both], dim=-2)


def confusion(answers: Tensor, truth: Tensor, classes: int) -> Tensor:
    """(heads, answers, classes) pixels, of answers (heads, H, W); those without a class are left out."""
    heads = torch.arange(len(answers), device=answers.device)[:, None, None]
    columns = classes + 1  # the last one for pixels without a class
    pairs = (heads * classes + answers) * columns + torch.where(truth == NO_CLASS, classes, truth)
    counts = torch.bincount(pairs.flatten(), minlength=len(answers) * classes * columns)
    return counts.view(-1, classes, columns)[..., :classes]


def largest(maps: Tensor, size: Sequence[int], stride: int = 1) -> Tensor:
    """(heads, H, W), the class that is largest in each pixel of maps (heads, C, h, w) that are enlarged to a
    size.
    """
    answers = []
    for of_head, possible in zip(maps, contenders(maps), strict=True):
        classes = possible.nonzero()[:, 0]
        large = enlarged(of_head[classes], size, stride)
        answers.append(classes[large.max(dim=0).indices])  # three times as fast as argmax
    return torch.stack(answers)


def contenders(maps: Tensor) -> Tensor:
    """(heads, C) of bool, the classes that may be the largest in a pixel of enlarged maps (heads, C, h, w).

    A pixel mixes four patches, whose winners' mean is beaten by the largest there. A class that is below this
    mean in all four patches has lost between them; most have, everywhere, and need not be enlarged.
    """
    padded = F.pad(maps, (1, 1, 1, 1), mode="replicate")
    height, width = maps.shape[-2] + 1, maps.shape[-1] + 1
    corners = [padded[..., top : top + height, left : left + width] for top in (0, 1) for left in (0, 1)]
    winners = [corner.argmax(dim=1, keepdim=True) for corner in corners]
    margin = 1e-5 * maps.abs().max()  # of rounding
    possible = torch.zeros(maps.shape[:2], dtype=torch.bool, device=maps.device)
    for corner in corners:
        mean = torch.stack([corner.gather(1, winner) for winner in winners]).mean(dim=0)
        possible |= (corner >= mean - margin).flatten(2).any(dim=2)
    return possible


def pooled(maps: Iterable[Tensor], things: Sequence[Thing]) -> Rows:
    """Objects, each by the mean of its part of the map (D, h, w) of its image."""
    own = {owner: list(several) for owner, several in groupby(things, key=lambda thing: thing.owner)}
    means = []
    for number, features in enumerate(maps):
        for thing in own.get(number, ()):
            outline = torch.from_numpy(coco_mask.decode(thing.code))[None, None].float()
            share = F.interpolate(outline.to(features.device), features.shape[-2:], mode="area")[0]
            means.append((features * share).sum(dim=(1, 2)) / share.sum())
    device = means[0].device
    labels = torch.tensor([thing.label for thing in things], device=device)
    return Rows(torch.stack(means), labels, torch.tensor([thing.owner for thing in things], device=device))


def segmentation_sheet(test: DenseSet, scores: Mapping[str, Score], count: int) -> Picture:
    """Images beside what is there and what each model sees: `typical` ones by the change from the first of
    several models to the last.

    The number above is the overlap in percent, over all classes (of objects, those) together: a few stray
    pixels of another class would halve a mean over the classes of one image.

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
            panels.append(
                (draw_objects(pale, names, [""] * len(names), colours, masks=masks, side=SIDE), title)
            )
        rows.append(side_by_side(*panels))
    return grid(rows)


def typical(changes: FloatArray, count: int) -> list[int]:
    """Places of at most so many items, from the worst change to the best, whose ranks are evenly spaced.

    Half of all changes lie on either side of the middle one. The items that change most would show more than
    the mean.
    """
    order = np.argsort(changes, kind="stable")
    count = min(count, len(order))
    ranks = (np.arange(count) + 0.5) * len(order) / count
    return [int(order[int(rank)]) for rank in ranks]
