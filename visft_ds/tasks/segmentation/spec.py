"""Instance segmentation as a task: what training, evaluation, export, prediction and planning ask of it."""

from __future__ import annotations

from typing import Any

from torch import nn

from visft_ds.data.samples import Batch
from visft_ds.tasks import Numbers, Results, Shapes, Truth
from visft_ds.tasks.average_precision import coco_average_precision
from visft_ds.tasks.classes import COCO_CATEGORY_IDS
from visft_ds.tasks.example import Example
from visft_ds.tasks.masks.rasters import decode_mask
from visft_ds.tasks.masks.task import MaskTask
from visft_ds.tasks.pictures import Picture
from visft_ds.tasks.segmentation.config import SegmentationHeadConfig, SegmentationTask
from visft_ds.tasks.segmentation.head import SegmentationHead
from visft_ds.tasks.segmentation.results import instances
from visft_ds.tasks.task import Classes, Words


class Segmentation(MaskTask):
    """Single-scale Mask2Former, or the plain head."""

    name = "segmentation"
    config = SegmentationTask
    pad_value = 128
    categories = COCO_CATEGORY_IDS

    def build_head(self, shapes: Shapes, head: Any, vocabulary_size: int | None) -> nn.Module:
        if isinstance(head, SegmentationHeadConfig):
            return SegmentationHead(shapes[-1][0], head)
        return super().build_head(shapes, head, vocabulary_size)

    def results(
        self,
        output: Any,
        batch: Batch,
        words: Words,
        classes: Classes = None,
        threshold: float = 0.0,
    ) -> Results:
        return instances(output, batch, self.categories if classes is None else classes, threshold)

    def measure(self, truth: Truth, results: Results, head: Any, of_record: bool) -> Numbers:
        return coco_average_precision(
            truth, results, masks=True, of_record=of_record, max_detections=head.max_detections
        )

    def picture(self, example: Example) -> Picture:
        with_mask = [annotation for annotation in example.objects() if annotation.get("segmentation")]
        size = example.raw.size
        return example.draw(with_mask, masks=lambda entry: decode_mask(entry["segmentation"], size))


SPEC = Segmentation()
