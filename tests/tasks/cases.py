"""Targets, batches and denominators of losses for the tests of heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visft_ds.data.samples import Batch, Map
from visft_ds.tasks.detection.data import DetectionTargets
from visft_ds.tasks.masks.data import MaskTargets

CLASSES = 6


def boxes_of(counts: Sequence[int], classes: int = CLASSES) -> DetectionTargets:
    """Random boxes inside the images."""
    total = sum(counts)
    return DetectionTargets(
        torch.rand(total, 4) * 0.5 + 0.2, torch.randint(classes, (total,)), torch.tensor(counts)
    )


def masks_of(
    counts: Sequence[int], classes: int = CLASSES, grid: tuple[int, int] = (12, 16), first: int = 0
) -> MaskTargets:
    """Random soft masks: blobs rather than noise, so that costs differ; classes from `first`."""
    total = sum(counts)
    blobs = F.interpolate(torch.randn(total + 1, 1, 4, 4), size=grid, mode="bicubic")[:total, 0]
    return MaskTargets(
        masks=(blobs.clamp(-1, 1) * 127.5 + 127.5).to(torch.uint8),
        labels=torch.randint(first, classes, (total,)),
        grids=torch.tensor([grid] * len(counts)),
        counts=torch.tensor(counts),
        keys=torch.arange(len(counts)) + 100,
    )


def map_of(features: Tensor, valid: Tensor, prefix: Tensor | None = None) -> Map:
    """A map whose images end with their last valid cells."""
    cells = torch.stack((valid.any(2).sum(1), valid.any(1).sum(1)), dim=1)
    return Map(features, valid, cells.double().cpu(), prefix)


def batch_of(count: int, targets: Mapping[str, Any] | None = None, **fields: Tensor) -> Batch:
    """A batch of real images of 8 x 8 pixels, numbered from 1."""
    numbers, square = torch.arange(count), torch.full((count, 2), 8)
    images, real = torch.zeros(count, 3, 8, 8, dtype=torch.uint8), torch.ones(count, dtype=torch.bool)
    given = {"images": images, "sizes": square, "original_sizes": square, "indices": numbers, "real": real}
    given |= {"image_ids": numbers + 1, "random_keys": numbers}
    return Batch(**{**given, **fields}, targets=targets or {})


def extents_of(batch: Batch) -> Tensor:
    """(B, 2) height and width of each image as a share of the batch's."""
    return (batch.sizes.double() / torch.tensor(batch.images.shape[-2:])).float()


def corners(x0: float, y0: float, x1: float, y1: float) -> list[float]:
    """A box as a polygon of COCO."""
    return [x0, y0, x1, y0, x1, y1, x0, y1]


def hide_parameters(head: nn.Module) -> None:
    """As under ZeRO-3: values are there between the start and the end of their owner's forward, and nowhere
    else.
    """
    for module in head.modules():
        if own := {parameter: parameter.detach().clone() for parameter in module.parameters(recurse=False)}:
            module.register_forward_pre_hook(
                lambda *_, own=own: [p.data.copy_(v) for p, v in own.items()] and None
            )
            module.register_forward_hook(lambda *_, own=own: [p.data.fill_(torch.nan) for p in own] and None)
        for parameter in own:
            parameter.data.fill_(torch.nan)


def denominators(task: str, criterion: Any, *targets: Any, parts: int = 1) -> dict[str, Tensor]:
    """As the training loop makes them: global sum, at least 1, divided by ranks times micro-batches."""
    counts = [criterion.count(batch_of(1, {task: one})) for one in targets]
    return {
        name: torch.tensor(max(sum(c[name] for c in counts), 1.0) / parts, dtype=torch.float64)
        for name in counts[0]
    }


def published_caption_name(name: str) -> str:
    """Parameter of our captioning head -> its name in the published code."""
    parts = {
        "decoder_att_": "attention.decoder_att.",
        "full_att_": "attention.full_att.",
        "f_beta_": "f_beta.",
    }
    within = name.removeprefix("recurrence.")
    for ours, published in parts.items():
        if within.startswith(ours):
            return published + within.removeprefix(ours)
    if within != name:
        return f"decode_step.{within}"
    return f"attention.{name}" if name.startswith("encoder_att.") else name
