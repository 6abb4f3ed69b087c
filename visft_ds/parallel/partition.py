"""Partition of a model into pipeline stages: places of ranks, cost of each layer, bounds between layers.

Costs are operations, not trained parameters: frozen blocks have none and are most of the work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from visft_ds.config.task_schema import Stream
from visft_ds.model import MultiTaskModel
from visft_ds.models import require_eva_vit
from visft_ds.planner.trace import META, Tracer, fused_attention
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
        lines, total = [], sum(self.costs)
        for number, ((start, stop), cost) in enumerate(zip(pairwise(self.bounds), self.stage_costs(), strict=True)):
            span = " to ".join(dict.fromkeys((self.names[start], self.names[stop - 1])))
            lines.append((f"stage {number}", f"{span} ({stop - start} layers), {cost / total:.1%} of the operations"))
        idle = f"{self.bubble(micro_batches):.0%} of the time, as predicted for {micro_batches} micro-batches to a step"
        return [*lines, ("waiting", f"{idle}; a smaller micro_batch gives more of them, which wait less")]


def plan_partition(
    module: MultiTaskModel,
    stages: int,
    streams: Mapping[str, Stream],
    micro: Mapping[str, int],
    *,
    name: str,
) -> Partition:
    """Divide the layers of a model such that the slowest stage has as little work as possible.

    Args:
        module: from `plan_model`, on the meta device; what trains in it is known.
        micro: images of a micro-batch, by stream.
        name: of the model, for messages.

    Raises:
        ValueError: more stages than layers.
    """
    depth = require_eva_vit(module.backbone).depth
    names = ("embedding", *(f"blocks.{index}" for index in range(depth)), "heads")
    if stages > len(names):
        raise ValueError(f"pipeline.stages = {stages}: {name} has {len(names)} layers; give at most as many")
    shares = sum(stream.share for stream in streams.values())
    costs = [0.0] * len(names)
    for stream in streams.values():
        for index, cost in enumerate(_stream_costs(module, stream, micro[stream.name])):
            costs[index] += cost * stream.share / shares
    return Partition(names, tuple(costs), divide(costs, stages))


def divide(costs: Sequence[float], stages: int) -> tuple[int, ...]:
    """Bounds of `stages` runs of layers, none empty: the most expensive run is as cheap as possible."""

    @cache
    def best(start: int, parts: int) -> tuple[float, float, tuple[int, ...]]:
        """(cost of the most expensive run, sum of squares, bounds): of equal divisions the most even one."""
        if parts == 1:
            last = sum(costs[start:])
            return last, last**2, (start, len(costs))
        options = []
        for stop in range(start + 1, len(costs) - parts + 2):
            first, (most, squares, bounds) = sum(costs[start:stop]), best(stop, parts - 1)
            options.append((max(first, most), first**2 + squares, (start, *bounds)))
        return min(options)

    return best(0, stages)[2]


def _stream_costs(module: MultiTaskModel, stream: Stream, images: int) -> list[float]:
    """Operations of each layer for a micro-batch of a stream, with images of the largest size, on shapes alone.

    Blocks are alike, so two are counted: one in front of all that trains, and one that gradients go through.
    """
    backbone = require_eva_vit(module.backbone)
    side = stream.largest_side() // backbone.patch_size or 1
    pixels = torch.empty(images, 3, side * backbone.patch_size, side * backbone.patch_size, device=META)
    with Tracer(META) as embedding, torch.no_grad():
        tokens = backbone.embed(pixels)
    trains = [any(p.requires_grad for p in block.parameters()) for block in backbone.blocks]
    first = trains.index(True) if any(trains) else len(trains)
    cost: dict[bool, float] = {}
    for flows, block in ((False, backbone.blocks[0]), (True, backbone.blocks[-1])):
        with Tracer(META) as counted, fused_attention(META), torch.set_grad_enabled(flows and first < len(trains)):
            out = backbone.run_block(block, tokens.detach().requires_grad_(torch.is_grad_enabled()))
            if out.requires_grad:
                out.sum().backward()
        cost[flows] = float(counted.operations)
    blocks = [cost[index >= first] for index in range(len(trains))]
    heads = sum(_head_operations(module, task, stream, images, side, flows=any(trains)) for task in stream.tasks)
    return [float(embedding.operations), *blocks, float(heads)]


def _head_operations(module: MultiTaskModel, task: str, stream: Stream, images: int, side: int, *, flows: bool) -> int:
    """Operations of a head's forward and backward, without criteria.

    Args:
        side: of the feature map, in patches.
        flows: the features need a gradient.
    """
    features = torch.empty(images, module.backbone.width, side, side, device=META, requires_grad=flows)
    valid = torch.empty(images, side, side, dtype=torch.bool, device=META)
    pixels = side * module.backbone.patch_size
    blank = TASKS[task].blank(images, (pixels, pixels), Content(caption_ids=_CAPTION_IDS), stream.image)
    inputs = {name: value.to(META) for name, value in blank.head_inputs().items()}
    with Tracer(META) as counted, fused_attention(META):
        output = module.heads[task](features, valid, **inputs)
        ends = [tensor.sum() for tensor in _tensors(output) if tensor.requires_grad]
        if ends:
            torch.stack(ends).sum().backward()
    return counted.operations


def _tensors(output: object) -> list[Tensor]:
    """Tensors of a head's output: a dataclass, its fields, and what those hold."""
    if isinstance(output, Tensor):
        return [output]
    items = output if isinstance(output, tuple) else getattr(output, "__dict__", {}).values()
    return [tensor for item in items for tensor in _tensors(item)]
