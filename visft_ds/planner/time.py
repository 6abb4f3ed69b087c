"""The time of a step by roofline: the rehearsed work at stated rates, the update, and what ranks send each other."""

from __future__ import annotations

from dataclasses import dataclass

from visft_ds.config.task_schema import Stream
from visft_ds.planner.cluster import LINK_SHARE, Rates
from visft_ds.planner.step import PlannedRun, rehearse

#: Bytes that AdamW moves for a value: reads it, its gradient and both moments, writes three of them; and the norm.
_UPDATE_BYTES = 32


@dataclass(frozen=True)
class PlannedTime:
    """Seconds of one optimiser step."""

    compute: float  #: forward and backward of all micro-batches
    update: float
    communication: float  #: not hidden behind computation
    waiting: float  #: of a pipeline that fills and drains

    @property
    def total(self) -> float:
        """All parts."""
        return self.compute + self.update + self.communication + self.waiting


def step_time(run: PlannedRun, stream: Stream, rates: Rates, link: float) -> PlannedTime:
    """Of one kind of step.

    Args:
        link: bytes a second that a rank exchanges with another in one direction, at its peak.
    """
    run = run.typical(stream)
    found, reached = rehearse(run, stream), LINK_SHARE * link
    batches, zero = run.batches, run.zero()
    micro = rates.seconds(found.work)
    shared = batches.dp if zero.stage else 1
    update = _UPDATE_BYTES * found.trained / shared / batches.stages / rates.bandwidth["plain"]
    # A ring sends every byte of an average, or of a division and a gathering, twice.
    exchanged = 2 * 4 * found.trained * (batches.dp - 1) / batches.dp / batches.stages / reached
    if batches.stages > 1:
        busy, whole = _of_pipeline(run, micro)
        # Tokens go forward and their gradients back; what the stages in between send lies beside computation.
        sent = 2 * (batches.stages - 1) * found.tokens / reached
        return PlannedTime(busy, update, exchanged + sent, whole - busy)
    compute = batches.accumulation * micro
    gathering = 0.0
    if zero.stage == 3:  # weights arrive ahead of what is computed with them: what takes longer decides
        passes = batches.accumulation * (1 + found.backbone_trains)
        gathering = passes * found.parameters * (batches.dp - 1) / batches.dp / reached
    return PlannedTime(compute, update, exchanged + max(0.0, gathering - compute), 0.0)


def _of_pipeline(run: PlannedRun, micro: float) -> tuple[float, float]:
    """Seconds in which a stage computes, and of the whole: the slowest stage decides, once the pipeline is full."""
    assert run.partition is not None
    costs, accumulation = run.partition.stage_costs(), run.batches.accumulation
    slowest = max(costs) / sum(costs)
    return accumulation * micro / run.batches.stages, ((accumulation - 1) * slowest + 1) * micro
