"""Segmentation by frozen feature maps: in context, by a linear head, and what the outlined objects are.

in-context mIoU  by the nearest patches of training images, `in_context`
linear mIoU      BatchNorm and a 1 x 1 convolution, `linear_segmentation`
objects kNN      features averaged over an object's outline, `knn`
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain

import torch
from faster_coco_eval import mask as coco_mask  # pycocotools' own warns under NumPy 2
from torch import Tensor
from torch.nn import functional as F

from visft_ds.evals.judge import linear_segmentation
from visft_ds.evals.judge.benchmark import Benchmark, Names, Number, Scores
from visft_ds.evals.judge.crops import label_of
from visft_ds.evals.judge.dense_probes import Source, probe, trained
from visft_ds.evals.judge.dense_sets import DenseSet, Thing, read_train_and_test
from visft_ds.evals.judge.heads import BATCH
from visft_ds.evals.judge.in_context import in_context_miou
from visft_ds.evals.judge.kinds import Request
from visft_ds.evals.judge.knn import knn
from visft_ds.evals.judge.miou import mean_iou
from visft_ds.evals.judge.protocol import NORMALISED, QUICK, SIZES, Protocol
from visft_ds.evals.judge.rows import Rows, rows_of_objects
from visft_ds.evals.judge.sheet import segmentation_sheet

IN_CONTEXT = Number(
    "in-context mIoU",
    how="Nothing is trained: a patch takes the classes of the 30 training patches nearest by cosine, "
    "weighted by softmax(similarity / 0.02).",
    published="Two augmented passes at 512 pixels (504 for patches of 14) fill a memory of at most "
    "10,240,000 patches, in which pixels without a class are class 0. Judged at 512 pixels, after a "
    "one-to-one matching of answers and classes; a class that does not occur counts as 0.",
    quick=f"Memory holds at most {QUICK.memory:,} patches. {SIZES}",
    source="https://github.com/vpariza/open-hummingbird-eval",
    differs=f"{NORMALISED}; search is exact (there quantised); all images take part (there not the last "
    "incomplete batch); ADE20k has 150 classes (there 151, with one for pixels without a class)",
    chooses_layer=True,
)
LINEAR = Number(
    "linear mIoU",
    how="Batch normalisation and a linear layer on patches, by AdamW at 1e-3.",
    published="40,000 steps of 16 augmented crops of 512 pixels; judged in windows of 512 pixels, 341 apart, "
    "at the label's size.",
    quick=f"{QUICK.segmentation.steps:,} steps of {BATCH} images. {SIZES}",
    source="https://github.com/facebookresearch/dinov3, eval/segmentation",
    differs=f"{NORMALISED}; 504 pixels and windows 336 apart for patches of 14; the last iterate is judged "
    "(there the best of eight evaluations on the test images)",
    chooses_layer=True,
    trained=True,
    crops=linear_segmentation.RECIPE.steps * BATCH,
)
OBJECTS = Number("objects kNN", how="The 20 objects nearest by the mean of their patches name an object.")
NUMBERS = (IN_CONTEXT, LINEAR, OBJECTS)


def benchmark(request: Request) -> Benchmark:
    """Segmentation of the images that a command line names."""
    train, test = read_train_and_test(request)
    return segmentation(request.label, train, test, request.protocol)


def segmentation(label: str, train: DenseSet, test: DenseSet, protocol: Protocol) -> Benchmark:
    """In-context and linear mIoU and, where objects are known, their kNN."""
    numbers = NUMBERS if test.things and train.things else (IN_CONTEXT, LINEAR)
    of_probes = probe(label, "segmentation 2", numbers, train, test, protocol, _scores)
    notes = [*train.notes, *test.notes]
    return replace(of_probes, notes=notes, sheet=partial(segmentation_sheet, test))


def _scores(source: Source, names: Names) -> Scores:
    if IN_CONTEXT.name in names:
        yield in_context_miou(IN_CONTEXT.name, source)
    if LINEAR.name in names:
        classes = len(source.train.classes)
        loss = linear_segmentation.cross_entropy
        recipe = source.protocol.segmentation
        heads = trained(source, classes, loss, recipe, linear_segmentation.crop, linear_segmentation.schedule)
        outputs = source.in_windows(heads)
        yield mean_iou(LINEAR.name, outputs, partial(label_of, source.test), classes)
    if OBJECTS.name in names:
        taught = _objects(source, source.train).in_groups(source.train.images.groups)
        yield knn(OBJECTS.name, taught, _objects(source, source.test))


def _objects(source: Source, data: DenseSet) -> Rows:
    return pooled(chain.from_iterable(source.whole(data)), data.things)


def pooled(maps: Iterable[Tensor], things: Sequence[Thing]) -> Rows:
    """Objects, each by the mean of its part of the map (D, h, w) of its image."""
    things_of_image = defaultdict(list)
    for thing in things:
        things_of_image[thing.owner].append(thing)
    means = []
    for number, features in enumerate(maps):
        for thing in things_of_image[number]:
            mask = torch.from_numpy(coco_mask.decode(thing.code)).to(features.device)
            shares = F.interpolate(mask[None, None].float(), features.shape[-2:], mode="area")[0]
            means.append((features * shares).sum(dim=(1, 2)) / shares.sum())
    return rows_of_objects(torch.stack(means), things)
