"""Partition of a model into pipeline stages: places of ranks, cost of each layer, bounds between layers.

Costs are operations (`costs.flops`), not trained parameters: frozen blocks have none and are most of the work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from visft_ds.config.schema import LoraConfig
from visft_ds.config.task_schema import Stream
from visft_ds.costs.flops import Flops, block_flops, tower_flops, tower_from
from visft_ds.model import MultiTaskModel
from visft_ds.models import require_eva_vit
from visft_ds.tasks import TASKS
from visft_ds.tasks.spec import Content

#: Ids of a caption, for its head's share of the work; COCO's have 10.5 words on average.
_CAPTION_IDS = 13


@dataclass(frozen=True)
class Partition:
    """Layers divided over stages."""

    names: tuple[str, ...]  #: of the layers, in order
    costs: tuple[float, ...]  #: of each layer, operations of an average micro-batch, forward and backward
    bounds: tuple[int, ...]  #: first layer of each stage, and the number of layers

    def stage_costs(self) -> list[float]:
        """Operations of each stage for an average micro-batch."""
        return [sum(self.costs[start:stop]) for start, stop in pairwise(self.bounds)]

    def bubble(self, micro_batches: int) -> float:
        """Predicted share of the time in which a stage waits, on average over the stages, in [0, 1).

        One micro-batch follows another as fast as the slowest stage allows, after the first went through all of them.
        With equal stages this is (stages - 1) / (micro_batches + stages - 1). Communication is not in it.
        """
        stages = self.stage_costs()
        busy = micro_batches * sum(stages)
        return 1 - busy / (len(stages) * ((micro_batches - 1) * max(stages) + sum(stages)))

    def rows(self, micro_batches: int) -> list[tuple[str, str]]:
        """Rows for the stages, and for the idle share of the time."""
        total = sum(self.costs)
        lines = []
        for number, cost in enumerate(self.stage_costs()):
            names = self.names[self.bounds[number] : self.bounds[number + 1]]
            span = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
            share = f"{100 * cost / total:.1f} % of the operations"
            lines.append((f"stage {number}", f"{span} ({len(names)} layer{'s' * (len(names) > 1)}), {share}"))
        idle = (
            f"{100 * self.bubble(micro_batches):.0f} % of the time, as predicted for {micro_batches} micro-batches to "
            "a step; a smaller micro_batch gives more of them, which wait less"
        )
        return [*lines, ("waiting", idle)]


def plan_partition(
    module: MultiTaskModel,
    stages: int,
    streams: Mapping[str, Stream],
    micro: Mapping[str, int],
    *,
    lora: LoraConfig | None,
    name: str,
) -> Partition:
    """Divide the layers of a model such that the slowest stage has as little work as possible.

    Args:
        module: from `plan_model`, on the meta device; what trains in it is known.
        micro: images of a micro-batch, by stream.
        lora: of its adapters, where they train.
        name: of the model, for messages.

    Raises:
        ValueError: more stages than layers.
    """
    depth = require_eva_vit(module.backbone).depth
    names = ("embedding", *(f"blocks.{index}" for index in range(depth)), "heads")
    if stages > len(names):
        raise ValueError(
            f"pipeline.stages = {stages}: {name} has {len(names)} layers (embedding, {depth} blocks, heads); give at "
            f"most {len(names)}"
        )
    shares = sum(stream.share for stream in streams.values())
    costs = [0.0] * len(names)
    for stream in streams.values():
        for index, cost in enumerate(_stream_costs(module, lora, stream, micro[stream.name])):
            costs[index] += cost * stream.share / shares
    return Partition(names, tuple(costs), divide(costs, stages))


def divide(costs: Sequence[float], stages: int) -> tuple[int, ...]:
    """Bounds of `stages` runs of layers, none empty: the most expensive run is as cheap as possible.

    Among divisions that are equal in this the most even one (least sum of squares) is taken.
    """
    count, sums = len(costs), [0.0, *accumulate(costs)]

    @cache
    def cheapest(start: int, parts: int) -> float:
        if parts == 1:
            return sums[count] - sums[start]
        stops = range(start + 1, count - parts + 2)
        return min(max(sums[stop] - sums[start], cheapest(stop, parts - 1)) for stop in stops)

    limit = cheapest(0, stages) * (1 + 1e-9)

    @cache
    def evenest(start: int, parts: int) -> tuple[float, tuple[int, ...]]:
        if parts == 1:
            last = sums[count] - sums[start]
            return (last**2 if last <= limit else float("inf")), (start, count)
        options = []
        for stop in range(start + 1, count - parts + 2):
            stage_cost = sums[stop] - sums[start]
            if stage_cost <= limit:
                rest, bounds = evenest(stop, parts - 1)
                options.append((stage_cost**2 + rest, (start, *bounds)))
        return min(options, default=(float("inf"), ()))

    return evenest(0, stages)[1]


def _stream_costs(module: MultiTaskModel, lora: LoraConfig | None, stream: Stream, images: int) -> list[float]:
    """Operations of each layer for a micro-batch of a stream, with images of the largest size."""
    backbone = require_eva_vit(module.backbone)
    side = stream.largest_side() // backbone.patch_size or 1
    patches = side * side
    trained = [name for name, parameter in backbone.named_parameters() if parameter.requires_grad]
    tower = tower_from(backbone, lora, trained)
    embedding = tower_flops(tower, images, 0, patches)
    blocks = block_flops(tower, images, patches + (backbone.cls_token is not None))
    heads = sum(
        (_head_flops(module, task, stream.image, images, side, flows=bool(trained)) for task in stream.tasks), Flops()
    )
    return [float(cost.all) for cost in (embedding, *blocks, heads)]


def _head_flops(
    module: MultiTaskModel, task: str, options: Mapping[str, Any], images: int, side: int, *, flows: bool
) -> Flops:
    """Operations that torch counts in a head's forward and backward, on shapes alone, without criteria.

    Args:
        module: on the meta device.
        options: of the task's images.
        side: of the feature map, in patches.
        flows: the features need a gradient.
    """
    features = torch.empty(images, module.backbone.width, side, side, device="meta", requires_grad=flows)
    valid = torch.empty(images, side, side, dtype=torch.bool, device="meta")
    pixels = side * module.backbone.patch_size
    blank = TASKS[task].blank(images, (pixels, pixels), Content(caption_ids=_CAPTION_IDS), options, features.device)
    inputs = {name: value.to("meta") for name, value in blank.head_inputs().items()}
    head: nn.Module = module.heads[task]
    with FlopCounterMode(display=False) as forward:
        output = head(features, valid, **inputs)
    ends = [tensor.sum() for tensor in _tensors(output) if tensor.requires_grad]
    with FlopCounterMode(display=False) as backward:
        if ends:
            torch.stack(ends).sum().backward()
    return Flops(forward.get_total_flops(), backward.get_total_flops())


def _tensors(output: object) -> list[Tensor]:
    """Tensors of a head's output: a dataclass, its fields, and what those hold."""
    if isinstance(output, Tensor):
        return [output]
    items = output if isinstance(output, tuple) else getattr(output, "__dict__", {}).values()
    return [tensor for item in items for tensor in _tensors(item)]
