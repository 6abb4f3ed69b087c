"""Detection as a task: what training, evaluation, export, prediction and planning ask of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import nn

from visft_ds.data.samples import Batch, Sample
from visft_ds.data.transforms import Geometry, ShortSides, Size, of_options
from visft_ds.tasks import Results
from visft_ds.tasks.average_precision import coco_average_precision
from visft_ds.tasks.criterion import Criterion
from visft_ds.tasks.detection.config import DetectionHeadConfig, DetectionLoss, DetectionTask
from visft_ds.tasks.detection.data import CropRecipe, DetectionTargets, detection_targets
from visft_ds.tasks.detection.dense import DenseCriterion, DenseHead, DenseOutput, dense_results
from visft_ds.tasks.detection.head import DetectionHead, postprocess
from visft_ds.tasks.detection.loss import DetectionCriterion
from visft_ds.tasks.example import Example
from visft_ds.tasks.pictures import Picture
from visft_ds.tasks.task import Classes, Content, ImageTargets, Options, Shapes, Task, Words


class Detection(Task):
    """The asymmetric DETR, or boxes around cells."""

    name = "detection"
    config = DetectionTask
    head = DetectionHead

    def geometry(self, options: Options) -> Geometry:
        return CropRecipe(of_options(ShortSides, options), options["crop_min_size"], options["crop_size"])

    def targets(
        self,
        train: bool,
        options: Options,
        words: Words,
        classes: Classes,
    ) -> ImageTargets:
        labels = None
        if classes is not None:
            labels = {category: label for label, category in enumerate(classes)}
        return partial(detection_targets, labels)

    def pack(self, samples: Sequence[Sample], frame: Size) -> DetectionTargets:
        boxes = [sample.targets[self.name]["boxes"] for sample in samples]
        labels = [sample.targets[self.name]["labels"] for sample in samples]
        counts = [len(of_image) for of_image in labels]
        return DetectionTargets(
            torch.from_numpy(np.concatenate(boxes)),
            torch.from_numpy(np.concatenate(labels)),
            torch.tensor(counts),
        )

    def blank(
        self,
        images: int,
        size: Size,
        content: Content,
        options: Options,
    ) -> DetectionTargets:
        objects = images * content.objects
        labels = torch.zeros(objects, dtype=torch.int64)
        return DetectionTargets(torch.zeros(objects, 4), labels, torch.full((images,), content.objects))

    def build_head(self, shapes: Shapes, head: DetectionHeadConfig, vocabulary_size: int | None) -> nn.Module:
        if head.type == "dense":
            return DenseHead([width for width, _ in shapes], head)
        return DetectionHead(shapes[-1][0], head)

    def losses(self, head: DetectionHeadConfig, loss: DetectionLoss) -> Criterion:
        return (DenseCriterion if head.type == "dense" else DetectionCriterion)(head, loss)

    def results(
        self,
        output: Any,
        batch: Batch,
        words: Words,
        classes: Classes = None,
        threshold: float = 0.0,
    ) -> Results:
        results_of = dense_results if isinstance(output, DenseOutput) else postprocess
        return results_of(output, batch, classes, threshold)

    def measure(
        self, truth: Mapping[str, Any], results: Results, head: DetectionHeadConfig, of_record: bool
    ) -> dict[str, float]:
        return coco_average_precision(truth, results, of_record=of_record, max_detections=head.max_detections)

    def picture(self, example: Example) -> Picture:
        return example.draw(example.objects(), boxes=itemgetter("bbox"))


SPEC = Detection()
