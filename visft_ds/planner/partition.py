"""Partition of a model into pipeline stages: the cost of each layer, and bounds between layers.

Costs are operations, not trained parameters: frozen blocks have none and are most of the work.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from typing import Any

from visft_ds.models import Backbone
from visft_ds.models.eva_vit import EvaViT
from visft_ds.planner.trace import Tracer


@dataclass(frozen=True)
class Partition:
    """Layers divided over stages: "embedding", "blocks.0", ..., "heads"."""

    costs: tuple[float, ...]  #: of each layer, operations of an average micro-batch, forward and backward
    bounds: tuple[int, ...]  #: first layer of each stage, and the number of layers

    def stage_costs(self) -> list[float]:
        """Operations of each stage for an average micro-batch."""
        return [sum(self.costs[start:stop]) for start, stop in pairwise(self.bounds)]

    def bubble(self, micro_batches: int) -> float:
        """Predicted share of the time in which a stage waits, on average over the stages, in [0, 1).

        One micro-batch follows another as fast as the slowest stage allows, after the first went through all
        of them. With equal stages this is (stages - 1) / (micro_batches + stages - 1). Communication is not
        in it.
        """
        stages = self.stage_costs()
        busy = micro_batches * sum(stages)
        lasting = (micro_batches - 1) * max(stages) + sum(stages)
        return 1 - busy / (len(stages) * lasting)

    def rows(self, micro_batches: int) -> list[tuple[str, str]]:
        """Rows for the stages, and for the idle share of the time."""
        blocks = [f"blocks.{index}" for index in range(len(self.costs) - 2)]
        names = ["embedding", *blocks, "heads"]
        total = sum(self.costs)
        rows = []
        for stage, (start, stop) in enumerate(pairwise(self.bounds)):
            span = names[start]
            if stop - start > 1:
                span += f" to {names[stop - 1]}"
            share = f"{sum(self.costs[start:stop]) / total:.1%} of the operations"
            rows.append((f"stage {stage}", f"{span} ({stop - start} layers), {share}"))
        idle = f"{self.bubble(micro_batches):.0%} of the time, predicted for {micro_batches} micro-batches"
        return [*rows, ("bubble", f"{idle} per step; a smaller micro_batch shrinks it")]


def divide(costs: Sequence[float], stages: int) -> tuple[int, ...]:
    """Bounds of `stages` runs of layers, none empty: the most expensive run is as cheap as possible."""

    @cache
    def best(start: int, runs: int) -> tuple[float, float, tuple[int, ...]]:
        """(cost of the most expensive run, sum of squares, bounds): of equal divisions the most even one."""
        if runs == 1:
            cost = sum(costs[start:])
            return cost, cost**2, (start, len(costs))
        options = []
        last_stop = len(costs) - runs + 1  # a layer for each run behind
        for stop in range(start + 1, last_stop + 1):
            cost = sum(costs[start:stop])
            most, squares, bounds = best(stop, runs - 1)
            options.append((max(cost, most), cost**2 + squares, (start, *bounds)))
        return min(options)

    return best(0, stages)[2]


@contextmanager
def operations_by_layer(tracer: Tracer, backbone: Backbone) -> Iterator[list[int]]:
    """Count the operations of each layer, as `Partition` has them, while a step is traced: a layer's part of
    the backward pass begins with the gradient of what the next one read. None are counted of timm's models.
    """
    if not isinstance(backbone, EvaViT):
        yield []
        return
    costs = [0] * (len(backbone.blocks) + 2)
    current = 0  # layer
    counted = 0  # operations before it was entered

    def enter(layer: int, *_: Any) -> None:
        nonlocal current, counted
        costs[current] += tracer.operations - counted
        counted = tracer.operations
        current = layer

    def begin(layer: int, _: Any, inputs: tuple[Any, ...]) -> None:
        enter(layer)
        if inputs[0].requires_grad:
            inputs[0].register_hook(partial(enter, layer - 1))

    for layer, module in enumerate([*backbone.blocks, backbone.norm], 1):
        module.register_forward_pre_hook(partial(begin, layer))
    yield costs
    enter(0)
