"""Segmentation as a task: what training, evaluation, export, prediction and planning ask of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import BaseModel
from torch import nn

from visft_ds.data.samples import Batch, Sample
from visft_ds.data.transforms import Geometry, Size, of_options
from visft_ds.tasks import Results
from visft_ds.tasks.average_precision import coco_average_precision
from visft_ds.tasks.classes import COCO_CATEGORY_IDS
from visft_ds.tasks.criterion import Criterion
from visft_ds.tasks.example import Example
from visft_ds.tasks.masks.config import MaskTask, PlainHeadConfig
from visft_ds.tasks.masks.data import LargeScaleJitter, SegmentationTargets, segmentation_targets
from visft_ds.tasks.masks.loss import SegmentationCriterion
from visft_ds.tasks.masks.plain import PlainHead
from visft_ds.tasks.masks.rasters import decode_mask, grid_size
from visft_ds.tasks.pictures import Picture
from visft_ds.tasks.segmentation.config import SegmentationHeadConfig, SegmentationTask
from visft_ds.tasks.segmentation.head import SegmentationHead
from visft_ds.tasks.segmentation.results import postprocess
from visft_ds.tasks.task import Classes, Content, ImageTargets, Options, Shapes, Task, Words


class Segmentation(Task):
    """Single-scale Mask2Former, or the plain head."""

    name = "segmentation"
    config: ClassVar[type[MaskTask]] = SegmentationTask
    losses: ClassVar[Callable[..., Criterion]] = SegmentationCriterion

    def schema(self, part: Literal["image", "head", "loss"], given: Options) -> type[BaseModel]:
        return (
            self.config.heads[given["type"]]
            if part == "head" and "type" in given
            else super().schema(part, given)
        )

    def build_head(
        self, shapes: Shapes, head: SegmentationHeadConfig | PlainHeadConfig, vocabulary_size: int | None
    ) -> nn.Module:
        if isinstance(head, PlainHeadConfig):
            return PlainHead(shapes, head)
        return SegmentationHead(shapes[-1][0], head)

    def geometry(self, options: Options) -> Geometry:
        return of_options(LargeScaleJitter, options)

    def targets(self, train: bool, options: Options, words: Words, classes: Classes) -> ImageTargets:
        labels = {id_: place for place, id_ in enumerate(COCO_CATEGORY_IDS if classes is None else classes)}
        return partial(segmentation_targets, labels, options["mask_stride"])

    def pack(self, samples: Sequence[Sample], frame: Size) -> SegmentationTargets:
        parts = [sample.targets[self.name] for sample in samples]
        counts = [len(part["labels"]) for part in parts]
        grids = np.array([part["masks"].shape[1:] for part in parts])
        masks = np.zeros((sum(counts), *grids.max(axis=0)), dtype=np.uint8)
        for end, part, (height, width) in zip(np.cumsum(counts), parts, grids, strict=True):
            masks[end - len(part["masks"]) : end, :height, :width] = part["masks"]
        sizes = np.array([sample.size for sample in samples])
        return SegmentationTargets(
            masks=torch.from_numpy(masks),
            labels=torch.from_numpy(np.concatenate([part["labels"] for part in parts])),
            extents=torch.from_numpy((sizes / frame).astype(np.float32)),
            mask_extents=torch.from_numpy((grids / grids.max(axis=0)).astype(np.float32)),
            counts=torch.tensor(counts),
            keys=torch.tensor([sample.random_key for sample in samples]),
        )

    def blank(self, images: int, size: Size, content: Content, options: Options) -> SegmentationTargets:
        objects, whole = images * content.objects, torch.ones(images, 2)
        masks = torch.empty(objects, *grid_size(size, int(options["mask_stride"])), dtype=torch.uint8)
        counts, keys = torch.full((images,), content.objects), torch.arange(images)
        return SegmentationTargets(masks, torch.zeros(objects, dtype=torch.int64), whole, whole, counts, keys)

    def results(
        self, output: Any, batch: Batch, words: Words, classes: Classes = None, threshold: float = 0.0
    ) -> Results:
        return postprocess(output, batch, classes, threshold)

    def measure(self, truth: Mapping[str, Any], results: Results, per_category: bool) -> dict[str, float]:
        return coco_average_precision(truth, results, masks=True, per_category=per_category)

    def picture(self, example: Example) -> Picture:
        true = [one for one in example.objects() if one.get("segmentation")]
        return example.draw(true, masks=lambda one: decode_mask(one["segmentation"], example.raw.size))


SPEC = Segmentation()
