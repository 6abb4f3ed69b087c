"""Messages between the processes of a configuration in an optimiser step: sizes, numbers, collectives.

Followed from deepspeed/runtime/zero/{stage_1_and_2,stage3,partition_parameters}.py, runtime/utils.py and runtime/pipe/
of the tested release; a test compares with the calls of real steps. From shapes alone: no model is built.

Letters: S bytes of a message as nccl-tests count them (all that is reduced, gathered or sent).
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from visft_ds.config.task_schema import Stream
from visft_ds.costs.hardware import DTYPES
from visft_ds.model import MultiTaskModel
from visft_ds.parallel.pipeline_layers import pipeline_layers
from visft_ds.planner.meta_step import blank_batch
from visft_ds.planner.step import PlannedRun, tokens_shape, trace_step
from visft_ds.prepare.model import plan_model

COLLECTIVES = ("all_reduce", "reduce_scatter", "all_gather", "broadcast", "send")
ALL_REDUCE, REDUCE_SCATTER, ALL_GATHER, BROADCAST, SEND = COLLECTIVES
_FP32 = 4
#: Of the all-reduce in which ranks agree on a step, see `parallel.distributed.agree_on_step`.
_AGREEMENT = 8 * 15
#: Of DeepSpeed's message in front of tensors whose shapes change from step to step.
_SHAPES = 4 * 256


@dataclass(frozen=True)
class Message:
    """Kind of call."""

    what: str
    collective: str  #: one of COLLECTIVES
    bytes: int  #: S
    calls: int  #: of a step
    hidden: bool = False  #: overlaps with computation, as far as that takes long enough


def bus_factor(collective: str, ranks: int) -> float:
    """Times that S crosses each link of a ring over `ranks` processes: the ratio of busbw to algbw of nccl-tests."""
    if collective == ALL_REDUCE:
        return 2 * (ranks - 1) / ranks
    return (ranks - 1) / ranks if collective in (ALL_GATHER, REDUCE_SCATTER) else 1.0


def messages_of(run: PlannedRun, stream: Stream, stage: int | None = None) -> list[Message]:
    """Messages that a rank sends in one optimiser step of a stream.

    Args:
        stage: of the rank in a pipeline; None: a rank that sends tokens and gradients, and averages most values.
    """
    batches, zero, found = run.batches, run.zero(), list[Message]()
    stages, accumulation = batches.stages, batches.accumulation

    def idle(name: str) -> bool:
        """Return True for heads that this stream does not teach."""
        return name.startswith("heads.") and name.split(".")[1] not in stream.tasks

    layout = _layout(run, stream)
    if stages > 1:  # tokens to the next stage, and their gradients back where something before it trains
        first_trained = next(number for number, values in enumerate(layout.taught) if values)
        if stage is None or stage < stages - 1:
            found.append(Message("tokens to the next stage", SEND, layout.tokens, accumulation))
            found.append(Message("their shapes", SEND, _SHAPES, accumulation))
        if (stages - 1 if stage is None else stage) > first_trained:
            found.append(Message("their gradients back", SEND, layout.tokens, accumulation))
    if batches.dp > 1:  # sums of gradients, and what comes back after the update
        here = max(range(stages), key=lambda number: sum(layout.held[number])) if stage is None else stage
        trained_bytes = _FP32 * layout.taught[here]
        # ZeRO-2 and 3 keep no whole gradient until the step's last micro-batch, so that each of them is summed.
        often = accumulation if zero.stage >= 2 else 1
        # Parameters are not cut at the end of a bucket, which is left out here.
        full, rest = divmod(trained_bytes, zero.reduce_bucket * _FP32) if zero.stage else (0, trained_bytes)
        buckets = [zero.reduce_bucket * _FP32] * full + ([rest] if rest or not zero.stage else [])
        collective = REDUCE_SCATTER if zero.stage == 3 else ALL_REDUCE
        for size, count in sorted(Counter(buckets).items(), reverse=True):
            found.append(Message("gradients of what trains", collective, size, count * often))
        if zero.stage in (1, 2):
            # Of every head, whether this step taught it or not, each group filled up to equal shares.
            updated = sum(-(-values // (2 * batches.dp)) * 2 * batches.dp for values in layout.held[here])
            found.append(Message("what was updated", ALL_GATHER, _FP32 * updated, 1))
    if batches.dp > 1 and zero.stage == 3:
        # Whole weights, gathered for the forward pass, and again for the backward pass unless that comes soon.
        backbone_trains, gathered = trace_step(run.alone(), stream).backbone_trains, Counter[int]()
        left = zero.max_reuse / 2  # elements, there and back again, over which a weight stays whole
        for name, parameter in reversed(list(_model(run).named_parameters())):
            if parameter.numel() > zero.persist_below and not idle(name):
                again = backbone_trains or not name.startswith("backbone.")
                left -= parameter.numel()
                gathered[parameter.numel() * parameter.element_size()] += 1 + (again and left < 0)
        for size, count in sorted(gathered.items(), reverse=True):
            found.append(Message("weights while they are needed", ALL_GATHER, size, count * accumulation, hidden=True))
    if batches.processes > 1:
        found.append(Message("agreement on the step", ALL_REDUCE, _AGREEMENT, 1))
    return found


def broadcasts_of(run: PlannedRun) -> list[Message]:
    """Messages sent once, when an engine is built: every parameter, from one rank to all (ZeRO 0-2)."""
    if run.batches.dp < 2 or run.zero().stage == 3:
        return []
    sizes = Counter(parameter.numel() * parameter.element_size() for parameter in _model(run).parameters())
    return [Message("weights at the start", BROADCAST, size, count) for size, count in sorted(sizes.items())]


class _Layout(NamedTuple):
    """Sizes of a stream's step on the stages of a pipeline; without one, on its only stage."""

    tokens: int  #: bytes of the activations between two stages
    taught: tuple[int, ...]  #: values that the step teaches, by stage
    held: tuple[tuple[int, ...], ...]  #: values that train in any step, by stage and group of the optimiser


_LAYOUTS: dict[object, _Layout] = {}


def _layout(run: PlannedRun, stream: Stream) -> _Layout:
    """The layout of a stream, from shapes alone; cached by all it depends on."""
    bounds = (0, 1) if run.partition is None else run.partition.bounds
    key = (run.model_key(stream), run.batches.micro[stream.name], run.content, bounds)
    if key not in _LAYOUTS:
        model, groups = plan_model(run.config.visft, run.config.optimizer.params, run.vocabulary_size)
        layers = [model] if run.partition is None else [layer for _, layer in pipeline_layers(model)]
        images = blank_batch(stream, run.batches.micro[stream.name], run.content).images
        tokens = 0 if run.partition is None else _FP32 * math.prod(tokens_shape(model, images))
        idle = {id(p) for task, head in model.heads.items() if task not in stream.tasks for p in head.parameters()}
        taught, held = list[int](), list[tuple[int, ...]]()
        for start, stop in pairwise(bounds):
            here = {id(p) for layer in layers[start:stop] for p in layer.parameters()}
            of_groups = [[p for p in group.parameters if id(p) in here] for group in groups]
            taught.append(sum(p.numel() for group in of_groups for p in group if id(p) not in idle))
            held.append(tuple(sum(p.numel() for p in group) for group in of_groups))
        _LAYOUTS[key] = _Layout(tokens, tuple(taught), tuple(held))
    return _LAYOUTS[key]


def _model(run: PlannedRun) -> MultiTaskModel:
    """On the meta device, every parameter as it is stored."""
    config = run.config
    return plan_model(config.visft, config.optimizer.params, run.vocabulary_size, DTYPES[run.precision])[0]
