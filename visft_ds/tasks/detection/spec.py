"""Detection as a task: what training, evaluation, export, prediction and planning ask of it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from visft_ds.data.dataset import coco_dataset
from visft_ds.data.transforms import ShortSides, of_options, places
from visft_ds.tasks import Results
from visft_ds.tasks.average_precision import coco_average_precision, pack_results, unpack_results
from visft_ds.tasks.detection.config import DetectionTask
from visft_ds.tasks.detection.data import (
    CropRecipe,
    DetectionTargets,
    detection_targets,
    pack_detection,
)
from visft_ds.tasks.detection.dense import DenseCriterion, DenseHead, DenseOutput, dense_results
from visft_ds.tasks.detection.head import DetectionCriterion, DetectionHead, DetectionOutput, postprocess
from visft_ds.tasks.pictures import Picture, draw_detections, palette
from visft_ds.tasks.spec import Content, Criterion, Evaluator, Example, HeadSizes, TaskSpec


def _blank(
    images: int, size: tuple[int, int], content: Content, options: Mapping[str, Any], device: torch.device
) -> DetectionTargets:
    objects = images * content.objects
    labels = torch.zeros(objects, dtype=torch.int64)
    return DetectionTargets(torch.zeros(objects, 4), labels, torch.full((images,), content.objects))


def _head(in_channels: int, *, type: str, num_classes: int, width: int, **of_detr: Any) -> nn.Module:
    if type == "dense":
        return DenseHead(in_channels, num_classes=num_classes, width=width)
    return DetectionHead(in_channels, num_classes=num_classes, **of_detr)


def _criterion(*, type: str, **options: Any) -> Criterion:
    if type == "dense":
        return DenseCriterion(ce=options["ce"], giou=options["giou"])
    return DetectionCriterion(**options)


def _results(output: DenseOutput | DetectionOutput, *given: Any, **options: Any) -> Results:
    if isinstance(output, DenseOutput):
        return dense_results(output, *given, **options)
    return postprocess(output, *given, **options)


def _draw(example: Example) -> Picture:
    true, found = example.objects(), example.known()
    return draw_detections(
        example.pixels(),
        [annotation["bbox"] for annotation in true],
        [example.names[annotation["category_id"]] for annotation in true],
        [result["bbox"] for result in found],
        [example.names[result["category_id"]] for result in found],
        [result["score"] for result in found],
        threshold=example.threshold,
        colours=palette(list(example.names.values())),
    )


SPEC = TaskSpec(
    name="detection",
    config=DetectionTask,
    head=DetectionHead,
    choose_head=_head,
    build_criterion=_criterion,
    shared_options=("type", "num_queries", "decoder_layers"),
    geometry=lambda options: CropRecipe(
        of_options(ShortSides, options), options["crop_short_sides"], options["crop_range"]
    ),
    targets=lambda train, options, classes=None: partial(
        detection_targets, None if classes is None else places(classes)
    ),
    pack=lambda samples, frame: pack_detection(samples),
    postprocess=_results,
    evaluator=Evaluator(
        truth=coco_dataset,
        measure=lambda truth, results, each: coco_average_precision(truth, results, per_category=each),
        pack=pack_results,
        unpack=unpack_results,
    ),
    draw=_draw,
    sizes=HeadSizes(
        in_channels=("input_proj.weight", 1, 0),
        options={
            "num_classes": ("class_embed.weight", 0, -1),  # the last row is "no object"
            "num_queries": ("query_embed.weight", 0, 0),
            "encoder_dim": ("input_proj.weight", 0, 0),
            "decoder_dim": ("class_embed.weight", 1, 0),
            "ffn_dim": ("decoder.layers.0.linear1.weight", 0, 0),
        },
        layers={"encoder_layers": "encoder.layers.", "decoder_layers": "decoder.layers."},
    ),
    blank=_blank,
)
