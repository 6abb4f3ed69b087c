"""Messages between the processes of a configuration in an optimiser step: sizes, numbers, collectives.

Followed from deepspeed/runtime/zero/{stage_1_and_2,stage3,partition_parameters}.py, runtime/utils.py and runtime/pipe/
of the tested release; a test compares with the calls of real steps. From shapes alone: no model is built.

Letters: S bytes of a message as nccl-tests count them (all that is reduced, gathered or sent).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from visft_ds.config.task_schema import Stream
from visft_ds.costs.hardware import DTYPES
from visft_ds.model import MultiTaskModel
from visft_ds.planner.step import PlannedRun, trace_step
from visft_ds.prepare.model import plan_model

COLLECTIVES = ("all_reduce", "reduce_scatter", "all_gather", "broadcast", "send")
ALL_REDUCE, REDUCE_SCATTER, ALL_GATHER, BROADCAST, SEND = COLLECTIVES
_FP32 = 4
#: Of the all-reduce in which ranks agree on a step, see `parallel.distributed.agree_on_step`.
_AGREEMENT = 8 * 15


@dataclass(frozen=True)
class Message:
    """Kind of call."""

    what: str
    collective: str  #: one of COLLECTIVES
    bytes: int  #: S
    calls: int  #: of a step
    hidden: bool = False  #: overlaps with computation, as far as that takes long enough


def messages_of(run: PlannedRun, stream: Stream) -> list[Message]:
    """The messages of one optimiser step of a stream, those of a rank in the middle where ranks differ."""
    batches, zero, found = run.batches, run.zero(), list[Message]()
    stages, accumulation = batches.stages, batches.accumulation

    def idle(name: str) -> bool:
        """Return True for heads that this stream does not teach."""
        return name.startswith("heads.") and name.split(".")[1] not in stream.tasks

    if stages > 1:  # tokens to the next stage, and their gradients back where something before it trains
        last = trace_step(run, stream, stages - 1)
        found.append(Message("tokens to the next stage", SEND, last.tokens, accumulation))
        if last.backbone_trains:
            found.append(Message("their gradients back", SEND, last.tokens, accumulation))
    if batches.dp > 1:  # sums of gradients, and what comes back after the update
        module, groups = plan_model(run.config.visft, run.config.optimizer.params, run.vocabulary_size)
        trained = [name for group in groups for name in group.names if not idle(name)]
        trained_bytes = sum(_FP32 * module.get_parameter(name).numel() for name in trained) // stages
        # ZeRO-2 and 3 keep no whole gradient until the step's last micro-batch, so that each of them is summed.
        often = accumulation if zero.stage >= 2 else 1
        # Parameters are not cut at the end of a bucket, which is left out here.
        full, rest = divmod(trained_bytes, zero.reduce_bucket * _FP32) if zero.stage else (0, trained_bytes)
        buckets = [zero.reduce_bucket * _FP32] * full + ([rest] if rest or not zero.stage else [])
        collective = REDUCE_SCATTER if zero.stage == 3 else ALL_REDUCE
        for size, count in sorted(Counter(buckets).items(), reverse=True):
            found.append(Message("gradients of what trains", collective, size, count * often))
        if zero.stage in (1, 2):
            found.append(Message("what was updated", ALL_GATHER, trained_bytes, 1))
    if batches.dp > 1 and zero.stage == 3:
        # Whole weights, gathered for the forward pass, and again for the backward pass unless that comes soon.
        backbone_trains, gathered = trace_step(run, stream).backbone_trains, Counter[int]()
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


def _model(run: PlannedRun) -> MultiTaskModel:
    """On the meta device, every parameter as it is stored."""
    config = run.config
    return plan_model(config.visft, config.optimizer.params, run.vocabulary_size, DTYPES[run.precision])[0]
