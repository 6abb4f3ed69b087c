"""Panoptic segmentation as a task: what training, evaluation, prediction and planning ask of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from visft_ds.data.dataset import labels_of_split
from visft_ds.data.panoptic import objects_of
from visft_ds.data.samples import Arrays, Batch, RawSample
from visft_ds.data.shards import ShardReader
from visft_ds.data.transforms import Op
from visft_ds.tasks import Numbers, Results, Shapes, Truth
from visft_ds.tasks.example import Example
from visft_ds.tasks.masks.data import mask_targets
from visft_ds.tasks.masks.regions import draw_regions
from visft_ds.tasks.masks.task import MaskTask
from visft_ds.tasks.panoptic.config import PanopticTask
from visft_ds.tasks.panoptic.head import PanopticHead
from visft_ds.tasks.panoptic.metrics import measure_panoptic
from visft_ds.tasks.panoptic.results import panoptic_results
from visft_ds.tasks.pictures import Picture, side_by_side
from visft_ds.tasks.task import Classes, Words


def panoptic_targets(
    labels: Mapping[int, int], raw: RawSample, ops: Sequence[Op], generator: np.random.Generator
) -> Arrays:
    """Masks and labels of the segments of an image, as `mask_targets` gives them; crowds give none."""
    segments = [] if raw.panoptic is None else objects_of(raw.panoptic)
    return mask_targets(labels, replace(raw, annotations=segments), ops, generator)


class Panoptic(MaskTask):
    """The plain mask head, which learns from things and stuff alike."""

    name = "panoptic"
    config = PanopticTask
    pad_value = 0
    categories = range(1000)
    of_image = staticmethod(panoptic_targets)

    def build_head(self, shapes: Shapes, head: Any, vocabulary_size: int | None) -> nn.Module:
        return PanopticHead(shapes, head)

    def results(
        self,
        output: Any,
        batch: Batch,
        words: Words,
        classes: Classes = None,
        threshold: float = 0.0,
    ) -> Results:
        categories = self.categories if classes is None else classes
        number = output.logits.shape[-1] - 1
        return panoptic_results(output, batch, categories[:number], threshold)

    def truth(self, reader: ShardReader, indices: Sequence[int]) -> dict[str, Any]:
        """Images that have a panoptic map, and their segments."""
        images = []
        segments = []
        for label in labels_of_split(reader, indices):
            if "panoptic" in label:
                image_id = label["image_id"]
                images.append({"id": image_id, "height": label["height"], "width": label["width"]})
                segments += [{**segment, "image_id": image_id} for segment in objects_of(label["panoptic"])]
        categories = []
        for category in reader.manifest.panoptic:
            isthing = int(category.thing)
            categories.append({"id": category.coco_id, "name": category.name, "isthing": isthing})
        return {"images": images, "annotations": segments, "categories": categories}

    def measure(self, truth: Truth, results: Results, head: Any, of_record: bool) -> Numbers:
        return measure_panoptic(truth, results, per_category=of_record)

    def picture(self, example: Example) -> Picture:
        pixels = example.pixels()
        true = [] if example.raw.panoptic is None else objects_of(example.raw.panoptic)
        panels = [(true, "ground truth"), (example.results, "predicted")]
        drawn = []
        for segments, title in panels:
            picture = draw_regions(pixels, segments, example.names)
            drawn.append((picture, f"{title}: {len(segments)} segments"))
        return side_by_side(*drawn)


SPEC = Panoptic()
