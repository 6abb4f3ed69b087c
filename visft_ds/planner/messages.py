"""Messages between the processes of a configuration in an optimiser step: sizes, numbers, collectives.

Followed from deepspeed/runtime/zero/{stage_1_and_2,stage3,partition_parameters}.py, runtime/utils.py and runtime/pipe/
of the tested release; a test compares with the calls of real steps. From shapes alone: no model is built.

Letters: S bytes of a message as nccl-tests count them (all that is reduced, gathered or sent).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from visft_ds.config.task_schema import Stream
from visft_ds.costs.hardware import DTYPES
from visft_ds.model import MultiTaskModel
from visft_ds.planner.step import PlannedRun, rehearse
from visft_ds.prepare.model import plan_model

ALL_REDUCE, REDUCE_SCATTER, ALL_GATHER, BROADCAST, SEND = (
    "all_reduce",
    "reduce_scatter",
    "all_gather",
    "broadcast",
    "send",
)
COLLECTIVES = (ALL_REDUCE, REDUCE_SCATTER, ALL_GATHER, BROADCAST, SEND)
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
    hidden: bool = False  #: beside computation, as far as that takes long enough


def messages_of(run: PlannedRun, stream: Stream) -> list[Message]:
    """The messages of one optimiser step of a stream, those of a rank in the middle where ranks differ."""
    batches, zero = run.batches, run.zero()
    found = list(_pipeline(run, stream)) if batches.stages > 1 else []
    if batches.dp > 1:
        found += _gradients(run, stream)
        if zero.stage == 3:
            found += _weights(run, stream)
    if batches.dp * batches.stages > 1:
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


def _gradients(run: PlannedRun, stream: Stream) -> Iterator[Message]:
    """Sums of gradients, and what comes back after the update."""
    zero, stages, accumulation = run.zero(), run.batches.stages, run.batches.accumulation
    sizes = _trained(run, stream)
    whole = sum(sizes) // stages
    # ZeRO-2 and 3 keep no whole gradient until the step's last micro-batch, so that each of them is summed.
    often = accumulation if zero.stage >= 2 else 1
    buckets = [whole] if zero.stage == 0 else _buckets(whole, zero.reduce_bucket * _FP32)
    collective = REDUCE_SCATTER if zero.stage == 3 else ALL_REDUCE
    for size, count in sorted(Counter(buckets).items(), reverse=True):
        yield Message("gradients of what trains", collective, size, count * often)
    if zero.stage in (1, 2):
        yield Message("what was updated", ALL_GATHER, whole, 1)


def _trained(run: PlannedRun, stream: Stream) -> list[int]:
    """Bytes of what learns from this stream; idle heads have no gradient to send."""
    module, groups = plan_model(run.config.visft, run.config.optimizer.params, run.vocabulary_size)
    names = [name for group in groups for name in group.names]
    return [_FP32 * module.get_parameter(name).numel() for name in names if not _is_idle(name, stream.tasks)]


def _buckets(whole: int, size: int) -> list[int]:
    """Bytes of each bucket; parameters are not cut, which is left out here."""
    full, rest = divmod(whole, size)
    return [size] * full + [rest] * bool(rest)


def _weights(run: PlannedRun, stream: Stream) -> Iterator[Message]:
    """ZeRO-3: whole weights, gathered for the forward pass, and again for the backward pass unless that comes soon."""
    zero, found = run.zero(), rehearse(run, stream)
    gathered: Counter[int] = Counter()
    left = zero.max_reuse / 2  # elements, there and back again, over which a weight stays whole
    for name, parameter in reversed(list(_model(run).named_parameters())):
        if parameter.numel() > zero.persist_below and not _is_idle(name, stream.tasks):
            again = found.backbone_trains or not name.startswith("backbone.")
            left -= parameter.numel()
            gathered[parameter.numel() * parameter.element_size()] += 1 + (again and left < 0)
    for size, count in sorted(gathered.items(), reverse=True):
        yield Message("weights while they are needed", ALL_GATHER, size, count * run.batches.accumulation, hidden=True)


def _is_idle(name: str, tasks: Sequence[str]) -> bool:
    return name.startswith("heads.") and name.split(".")[1] not in tasks


def _pipeline(run: PlannedRun, stream: Stream) -> Iterator[Message]:
    """Tokens to the next stage, and their gradients back where something before it trains."""
    found, accumulation = rehearse(run, stream, run.batches.stages - 1), run.batches.accumulation
    yield Message("tokens to the next stage", SEND, found.tokens, accumulation)
    if found.backbone_trains:
        yield Message("their gradients back", SEND, found.tokens, accumulation)
