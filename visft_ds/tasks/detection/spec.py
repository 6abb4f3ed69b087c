"""Detection as a task: what training, evaluation, export, prediction and planning ask of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from visft_ds.data.samples import Batch, Sample
from visft_ds.data.transforms import Geometry, ShortSides, Size, of_options
from visft_ds.tasks import Annotation, Numbers, Results, Shapes, Truth
from visft_ds.tasks.average_precision import WITHOUT_MASK, coco_average_precision
from visft_ds.tasks.criterion import Criterion
from visft_ds.tasks.detection.config import DetectionHeadConfig, DetectionLoss, DetectionTask
from visft_ds.tasks.detection.data import (
    CropRecipe,
    DetectionTargets,
    InstanceTargets,
    detection_targets,
    instance_targets,
)
from visft_ds.tasks.detection.dense import DenseCriterion, DenseHead, DenseOutput, dense_results
from visft_ds.tasks.detection.head import DetectionHead, postprocess
from visft_ds.tasks.detection.loss import DetectionCriterion
from visft_ds.tasks.detection.roi import SIDE
from visft_ds.tasks.example import Example
from visft_ds.tasks.masks.rasters import decode_mask
from visft_ds.tasks.pictures import Picture
from visft_ds.tasks.task import Classes, Content, ImageTargets, Options, Task, Words


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
        if train and options.get("masks"):
            return partial(instance_targets, labels)
        return partial(detection_targets, labels)

    def pack(self, samples: Sequence[Sample], frame: Size) -> DetectionTargets:
        targets = [sample.targets[self.name] for sample in samples]
        counts = [len(target["labels"]) for target in targets]
        packed = DetectionTargets(_joined(targets, "boxes"), _joined(targets, "labels"), torch.tensor(counts))
        if "masks" not in targets[0]:
            return packed
        numbers = [len(target["masks"]) for target in targets]
        room = max(1, *numbers)
        regions = torch.zeros(len(targets), room, 4)
        chosen = []
        for image, target in enumerate(targets):
            regions[image, : numbers[image]] = torch.from_numpy(target["regions"])
            chosen.append(torch.arange(numbers[image]) + image * room)
        return InstanceTargets(
            **vars(packed), regions=regions, chosen=torch.cat(chosen), masks=_joined(targets, "masks")
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
        targets = DetectionTargets(torch.zeros(objects, 4), labels, torch.full((images,), content.objects))
        if not options.get("masks"):
            return targets
        return InstanceTargets(
            **vars(targets),
            regions=torch.zeros(images, content.objects, 4),
            chosen=torch.arange(objects),
            masks=torch.zeros(objects, SIDE, SIDE, dtype=torch.uint8),
        )

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

    def measure(self, truth: Truth, results: Results, head: DetectionHeadConfig, of_record: bool) -> Numbers:
        measure = partial(
            coco_average_precision, truth, results, of_record=of_record, max_detections=head.max_detections
        )
        numbers = measure()
        objects = truth["annotations"]
        if not head.masks:
            return numbers
        if objects and not any(annotation.get("segmentation") for annotation in objects):
            return numbers | {WITHOUT_MASK: float(len(objects))}
        return numbers | measure(masks=True)

    def picture(self, example: Example) -> Picture:
        shapes: dict[str, Callable[[Annotation], Any]] = {"boxes": itemgetter("bbox")}
        if any("segmentation" in result for result in example.results):
            shapes["masks"] = partial(_mask_of, example.raw.size)
        return example.draw(example.objects(), **shapes)


def _mask_of(size: Size, annotation: Annotation) -> Any:
    """Mask (H, W) of an object or a result; nothing of an object without one."""
    return decode_mask(annotation.get("segmentation") or [[0.0] * 6], size)


def _joined(targets: Sequence[Mapping[str, Any]], name: str) -> Tensor:
    """An entry of the targets of all images, concatenated."""
    return torch.from_numpy(np.concatenate([target[name] for target in targets]))


SPEC = Detection()
