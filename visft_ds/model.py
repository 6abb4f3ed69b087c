"""The model that trains: one backbone, one head per task, and the losses, in one forward.

Heads and criteria run inside `forward`: ZeRO gathers parameters and reduces gradients in hooks of the module
that it wraps, which fire in that module's forward only. Letters: B images, H W pixels, h w patch grid, D
width of the backbone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visft_ds.data.features import FeatureCache
from visft_ds.data.samples import Batch, Map, valid_region
from visft_ds.models import Backbone
from visft_ds.models.eva_vit import Grids, stacked
from visft_ds.ops import at_least_float32, autocast_dtype, autocast_to, to_device
from visft_ds.tasks.criterion import Criterion, LossDenominators, tensors_of

#: How images reach the backbone. A run never resumes under another rule, which would give other features.
PADDING = "each image alone, in whole cells"


@dataclass(frozen=True)
class TaskModule:
    """Head and criterion that a task adds to the model."""

    head: nn.Module
    criterion: Criterion
    #: Keyword arguments of the head in evaluation (beams).
    decoding: Mapping[str, Any] = field(default_factory=dict)


def normalise_pixels(backbone: Backbone, images: Tensor, sizes: Tensor) -> Tensor:
    """Input of a backbone: images normalised by channel or band, their sides whole cells; padding becomes 0,
    the mean.

    Args:
        backbone: whose mean and standard deviation of a channel are meant.
        images: (B, 3, H, W) uint8, or (B, n, H, W) float32 of bands, padded right and bottom.
        sizes: (B, 2) int64 on any device, height and width of the valid part.

    Returns:
        (B, n, H, W) float32, H and W multiples of the pixels to a cell: no pixel is lost right and below.
    """
    height, width = images.shape[-2:]
    device = images.device
    channels = torch.tensor([backbone.pixel_mean, backbone.pixel_std])
    mean, std = to_device(channels, device).view(2, -1, 1, 1) * 255.0
    valid = valid_region(to_device(sizes, device), (height, width), (height, width))
    normalised = (images.float() - mean) / std
    whole_height, whole_width = whole_cells((height, width), backbone.patch_size)
    right = whole_width - width
    below = whole_height - height
    return F.pad(normalised * valid.unsqueeze(1), (0, right, 0, below))


def whole_cells(size: Sequence[int], cell: int) -> tuple[int, int]:
    """(height, width) in pixels of the whole cells that show an image of this size; at least one each way.

    A panorama of 2000 x 20 pixels that is scaled down may have a height of 7.
    """
    height, width = size
    rows = max(1, math.ceil(height / cell))
    columns = max(1, math.ceil(width / cell))
    return rows * cell, columns * cell


def with_prefixes(tensors: Sequence[Tensor]) -> list[tuple[Tensor, Tensor | None]]:
    """Each map (B, D, h, w) that a backbone gives, and the tokens (B, P, D) in front of its patches or None;
    these follow all maps.
    """
    maps = [tensor for tensor in tensors if tensor.ndim == 4]
    prefixes: Sequence[Tensor | None] = tensors[len(maps) :]
    if not prefixes:
        prefixes = [None] * len(maps)
    return list(zip(maps, prefixes, strict=True))


class MultiTaskModel(nn.Module):
    """Backbone and heads. In training the result is a dict of losses, in evaluation one output per head.

    Args:
        backbone: images (B, 3, H, W) -> maps (B, D, h, w).
        tasks: task name -> head and criterion.
        train_backbone: False in stage 1, where the backbone runs without a graph.
        heads_active: False in stage 2, where frozen heads run in evaluation mode (no dropout).

    `faults` is None as long as a loss that cannot be computed (a matching cost of NaN) is an error. The
    engines put a list there: then the message goes into it and the loss is NaN, so that all ranks finish the
    backward pass together.

    `feature_cache` keeps the features of a frozen backbone. It is used for batches with `views`: images whose
    crop and flip repeat after some epochs (`data.features`).

    Features of an image are those of it alone, whatever lies beside it: the backbone never sees the batch's
    padding. Heads follow an autocast to bf16 unless `heads_in_fp32`; losses never do.
    """

    def __init__(
        self,
        backbone: Backbone,
        tasks: Mapping[str, TaskModule],
        *,
        train_backbone: bool,
        heads_active: bool,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.heads = nn.ModuleDict()
        self.criteria: dict[str, Criterion] = {}
        self.decoding: dict[str, Mapping[str, Any]] = {}
        for name, task in tasks.items():
            self.heads[name] = task.head
            self.criteria[name] = task.criterion
            self.decoding[name] = task.decoding
        self.train_backbone = train_backbone
        self.heads_active = heads_active
        self.faults: list[str] | None = None
        self.feature_cache: FeatureCache | None = None
        self.heads_in_fp32 = False

    def train(self, mode: bool = True) -> MultiTaskModel:
        """Training mode for what trains only: frozen parts stay in evaluation mode."""
        super().train(mode)
        self.backbone.train(mode and self.train_backbone)
        self.heads.train(mode and self.heads_active)
        return self

    def features(self, batch: Batch) -> tuple[Map, ...]:
        """Maps of the backbone, as heads read them."""
        if batch.views is not None:
            tensors = self._features_of_views(batch)
        else:
            pixels = normalise_pixels(self.backbone, batch.images, batch.sizes)
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.train_backbone):
                features = self.backbone(pixels, self.frames(batch), prefixes=True)
                tensors = [at_least_float32(tensor) for tensor in features]
        size = self.padded_size(batch)
        pairs = with_prefixes(tensors)
        return tuple(Map.of(map_, batch.sizes, size, prefix) for map_, prefix in pairs)

    def frames(self, batch: Batch) -> Grids | None:
        """Height and width in pixels at which the backbone sees each image: whole cells, without the batch's
        padding.

        An image keeps the padding that its transform gave it, so that it looks as it would alone. None: all
        images have the same cells, and are a batch. Not so with a backbone that takes them `one_by_one`, if
        images of the stream can differ.
        """
        if batch.frames is None:
            return None
        frames = [whole_cells(frame, self.backbone.patch_size) for frame in batch.frames.tolist()]
        alike = len(set(frames)) == 1
        assert alike or batch.mixed, f"a stream of one size has images of {frames}"
        if alike and not (batch.mixed and self.backbone.one_by_one):
            return None
        return frames

    def padded_size(self, batch: Batch) -> tuple[int, int]:
        """(H, W) in pixels of the whole cells that a batch is padded to; known without pixels."""
        if batch.frames is None:
            return whole_cells(batch.images.shape[-2:], self.backbone.patch_size)
        heights, widths = zip(*batch.frames.tolist(), strict=True)
        return whole_cells((max(heights), max(widths)), self.backbone.patch_size)

    def _features_of_views(self, batch: Batch) -> list[Tensor]:
        """Features of each image alone, rounded as the cache stores them.

        So the features of an image do not depend on whether they came from the cache, and those that did need
        no pixels.
        """
        assert self.feature_cache is not None and batch.views is not None and not self.train_backbone
        images: list[list[Tensor]] = []
        for position, view in enumerate(batch.views):
            stored = view.features
            if stored is None:
                stored = self._features_to_store(batch, position, view.frame)
                key = int(batch.random_keys[position])
                index = int(batch.indices[position])
                self.feature_cache.put(key, index, view.frame, stored)
            images.append([tensor.float() for tensor in stored])
        return [stacked(of_images) for of_images in zip(*images, strict=True)]

    def _features_to_store(self, batch: Batch, position: int, frame: tuple[int, int]) -> tuple[Tensor, ...]:
        """Maps (h, w, D) and tokens (P, D) of one image of a batch, bf16."""
        height, width = frame
        alone = slice(position, position + 1)
        image = batch.images[alone, :, :height, :width]
        pixels = normalise_pixels(self.backbone, image, batch.sizes[alone])
        with torch.no_grad():
            features = self.backbone(pixels, prefixes=True)
        stored = []
        for tensor in features:
            of_image = tensor[0]
            if of_image.ndim == 3:
                of_image = of_image.permute(1, 2, 0)
            stored.append(of_image.bfloat16())
        return tuple(stored)

    def forward(self, batch: Batch, loss_denominators: LossDenominators | None = None) -> dict[str, Any]:
        """Losses of a batch, or predictions where no denominators are given.

        Args:
            batch: images and the targets of one task ("sampled" mode) or of all ("shared" mode).
            loss_denominators: per task the numbers its losses are divided by; they hold for the whole
                optimiser step (all ranks and micro-batches), so that the mean over micro-batches is the loss
                of the global batch.

        Returns:
            With denominators, as 0-d tensors: {"loss": sum over tasks, "<task>": the task's weighted sum,
            "<task>/<name>": each unweighted loss}.
            Without: {task: the head's output} for the tasks of the batch, or for every head where it has no
            targets.
        """
        return self.outputs(self.features(batch), batch, loss_denominators)

    def outputs(
        self, maps: Sequence[Map], batch: Batch, loss_denominators: LossDenominators | None = None
    ) -> dict[str, Any]:
        """The second half of `forward`, heads and losses; a pipeline's last stage calls it, which has no
        pixels.
        """
        device = maps[-1].features.device
        in_bf16 = autocast_dtype(device) == torch.bfloat16 and not self.heads_in_fp32
        predicted = {}
        with autocast_to(device, torch.bfloat16 if in_bf16 else None):
            for task in batch.targets or self.heads:
                inputs = self._inputs(task, batch, loss_denominators is not None)
                predicted[task] = self.heads[task](maps, **inputs)
        if loss_denominators is None:
            return predicted
        losses: dict[str, Tensor] = {}
        with autocast_to(device, None):
            for task, output in predicted.items():
                losses |= self._losses(task, output, batch, loss_denominators[task])
            total = torch.stack([losses[task] for task in batch.targets]).sum()
        return {"loss": total, **losses}

    def _inputs(self, task: str, batch: Batch, with_losses: bool) -> Mapping[str, Any]:
        """Arguments of a head besides the maps; for losses fields of its targets, and of the batch, that it
        asks for.
        """
        if not with_losses:
            return self.decoding[task]
        target = batch.targets[task]
        inputs = {name: getattr(target, field) for name, field in target.head_inputs.items()}
        for name in getattr(self.heads[task], "reads", ()):
            inputs[name] = getattr(batch, name)
        return inputs

    def _losses(
        self,
        task: str,
        output: Any,
        batch: Batch,
        denominators: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """{task: its weighted sum, "<task>/<name>": each unweighted loss}; NaN alone after a fault."""
        criterion = self.criteria[task]
        try:
            losses = criterion(output, batch.targets[task], denominators, batch.image_ids)
        except FloatingPointError as error:
            if self.faults is None:
                raise
            self.faults.append(f"{task}: {error}")
            # A function of all outputs: the backward pass runs as it does on the other ranks.
            sums = [tensor.float().sum() for tensor in tensors_of(output) if tensor.requires_grad]
            return {task: torch.stack(sums).sum() * torch.nan}
        # Names without a weight are for the log only.
        weighted = []
        for name, weight in criterion.weights.items():
            if name in losses:
                weighted.append(weight * losses[name])
        named = {f"{task}/{name}": value for name, value in losses.items()}
        return {task: torch.stack(weighted).sum(), **named}
