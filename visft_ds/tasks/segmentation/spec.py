"""Segmentation as a task: what training, evaluation, export, prediction and planning ask of it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from visft_ds.data.dataset import coco_dataset
from visft_ds.data.transforms import of_options, places
from visft_ds.tasks.average_precision import coco_average_precision
from visft_ds.tasks.classes import COCO_CATEGORY_IDS
from visft_ds.tasks.pictures import Picture, palette
from visft_ds.tasks.segmentation.config import SegmentationTask
from visft_ds.tasks.segmentation.data import (
    LargeScaleJitter,
    SegmentationTargets,
    image_targets,
    pack_segmentation,
    problem_of,
)
from visft_ds.tasks.segmentation.loss import SegmentationCriterion, SegmentationHead, postprocess
from visft_ds.tasks.segmentation.masks import grid_size
from visft_ds.tasks.segmentation.pictures import decode_mask, draw_masks
from visft_ds.tasks.spec import Content, Evaluator, Example, HeadSizes, TaskSpec


def _blank(
    images: int, size: tuple[int, int], content: Content, options: Mapping[str, Any], device: torch.device
) -> SegmentationTargets:
    objects, whole = images * content.objects, torch.ones(images, 2)
    masks = torch.empty(objects, *grid_size(size, int(options["mask_stride"])), dtype=torch.uint8, device=device)
    counts, keys = torch.full((images,), content.objects), torch.arange(images)
    return SegmentationTargets(masks, torch.zeros(objects, dtype=torch.int64), whole, whole, counts, keys)


def _draw(example: Example) -> Picture:
    true, found = [a for a in example.objects() if a.get("segmentation")], example.known()
    return draw_masks(
        example.pixels(),
        [decode_mask(annotation["segmentation"], *example.raw.size) for annotation in true],
        [example.names[annotation["category_id"]] for annotation in true],
        [decode_mask(result["segmentation"], *example.raw.size) for result in found],
        [example.names[result["category_id"]] for result in found],
        [result["score"] for result in found],
        threshold=example.threshold,
        colours=palette(list(example.names.values())),
    )


SPEC = TaskSpec(
    name="segmentation",
    config=SegmentationTask,
    head=SegmentationHead,
    build_criterion=SegmentationCriterion,
    shared_options=("num_classes", "num_queries", "decoder_layers", "labelling"),
    geometry=partial(of_options, LargeScaleJitter),
    targets=lambda train, options, classes=COCO_CATEGORY_IDS: partial(
        image_targets, places(classes), options["mask_stride"]
    ),
    pack=pack_segmentation,
    postprocess=postprocess,
    evaluator=Evaluator(
        truth=coco_dataset,
        measure=lambda truth, results, each: coco_average_precision(truth, results, "segm", per_category=each),
    ),
    draw=_draw,
    sizes=HeadSizes(
        in_channels=("pixel_decoder.input_proj.weight", 1, 0),
        options={
            "num_classes": ("decoder.class_embed.weight", 0, -1),
            "num_queries": ("decoder.query_feat.weight", 0, 0),
            "hidden_dim": ("decoder.class_embed.weight", 1, 0),
            "encoder_ffn_dim": ("pixel_decoder.layers.0.linear1.weight", 0, 0),
            "decoder_ffn_dim": ("decoder.layers.0.linear1.weight", 0, 0),
        },
        layers={"encoder_layers": "pixel_decoder.layers.", "decoder_layers": "decoder.layers."},
        attributes=("labelling",),
        points="pixel_decoder.layers.0.self_attn.attention_weights.weight",  # of the one feature level
    ),
    blank=_blank,
    data_problem=problem_of,
)
