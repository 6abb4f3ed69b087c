"""Semantic segmentation as a task: what training, evaluation, export, prediction and planning ask of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from faster_coco_eval import mask as coco_mask  # pycocotools' own warns under NumPy 2
from torch import nn

from visft_ds.data.samples import Batch, Sample
from visft_ds.data.transforms import Geometry, Size, of_options
from visft_ds.tasks import Results
from visft_ds.tasks.classes import VOID, category_name
from visft_ds.tasks.criterion import Criterion
from visft_ds.tasks.example import Example
from visft_ds.tasks.masks.data import LargeScaleJitter, segmentation_targets
from visft_ds.tasks.masks.loss import SegmentationCriterion
from visft_ds.tasks.pictures import Picture, side_by_side
from visft_ds.tasks.segmentation.spec import Segmentation
from visft_ds.tasks.semantic.config import LOSSES, SemanticHeadConfig, SemanticTask
from visft_ds.tasks.semantic.data import SemanticTargets
from visft_ds.tasks.semantic.head import LinearHead, SemanticCriterion
from visft_ds.tasks.semantic.results import (
    Windows,
    cut_windows,
    draw_regions,
    measure_semantic,
    semantic_results,
)
from visft_ds.tasks.task import Classes, Content, ImageTargets, Options, Predict, Shapes, Words

#: Sides of images in evaluation are multiples of it, so that patches and strides lose no strip.
_MULTIPLE = 32


class Semantic(Segmentation):
    """A linear head on the maps, or the plain mask head, which learn from masks of classes."""

    name = "semantic"
    config = SemanticTask

    def geometry(self, options: Options) -> Geometry:
        return of_options(LargeScaleJitter, {**options, "eval_multiple": _MULTIPLE})

    def targets(self, train: bool, options: Options, words: Words, classes: Classes) -> ImageTargets:
        places = {id_: place for place, id_ in enumerate(range(VOID) if classes is None else classes)}
        return partial(segmentation_targets, places, options["mask_stride"])

    def pack(self, samples: Sequence[Sample], frame: Size) -> SemanticTargets:
        masks, grids = (
            super().pack(samples, frame),
            [one.targets[self.name]["masks"].shape[1:] for one in samples],
        )
        return SemanticTargets(**vars(masks), grids=torch.tensor(grids), shares=masks.extents)

    def blank(self, images: int, size: Size, content: Content, options: Options) -> SemanticTargets:
        masks = super().blank(images, size, content, options)
        grids = torch.tensor([masks.masks.shape[1:]]).expand(images, 2)
        return SemanticTargets(**vars(masks), grids=grids, shares=masks.extents)

    def outputs(self, predict: Predict, batch: Batch, options: Options) -> Mapping[str, Any]:
        side = options.get("window")
        if side is None or options["fixed_size"] is not None:
            return predict(batch)
        windows, starts = cut_windows(batch, side)
        return {self.name: Windows(predict(windows)[self.name], starts, windows.images.shape[-2:])}

    def build_head(self, shapes: Shapes, head: Any, vocabulary_size: int | None) -> nn.Module:
        if isinstance(head, SemanticHeadConfig):
            return LinearHead([width for width, _ in shapes], head)
        return super().build_head(shapes, head, vocabulary_size)

    def losses(self, head: Any, loss: Any) -> Criterion:
        if isinstance(head, SemanticHeadConfig):
            return SemanticCriterion(head, loss)
        return SegmentationCriterion(head, loss, self.name)

    def criterion(self, head_options: Options, loss_options: Options) -> Criterion:
        head = self.settings("head", head_options)
        return self.losses(head, LOSSES[head.type](**loss_options))

    def results(
        self, output: Any, batch: Batch, words: Words, classes: Classes = None, threshold: float = 0.0
    ) -> Results:
        return semantic_results(output, batch, classes)

    def measure(self, truth: Mapping[str, Any], results: Results, per_category: bool) -> dict[str, float]:
        return measure_semantic(truth, results, per_category)

    def describe(self, results: Results, names: Mapping[int, str]) -> str:
        """Shares of the image, the largest first."""
        parts = [
            (coco_mask.area(one["segmentation"]) / math.prod(one["segmentation"]["size"]), one)
            for one in results
        ]
        parts.sort(key=lambda part: -part[0])
        return ", ".join(f"{category_name(one['category_id'], names)} {share:.0%}" for share, one in parts)

    def picture(self, example: Example) -> Picture:
        pixels = example.pixels()
        kinds = {"ground truth": example.raw.annotations, "predicted": example.results}
        panels = [(draw_regions(pixels, found, example.names), title) for title, found in kinds.items()]
        return side_by_side(*panels)


SPEC = Semantic()
