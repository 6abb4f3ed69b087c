"""The memory of a configuration before anything is allocated: bytes by part on the fullest rank.

The model's own step is rehearsed on the meta device (`rehearsal`), and what the engine holds is added (`zero`).
Libraries' workspaces, the CUDA context and fragmentation are not in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch

from visft_ds.config import ResolvedConfig, derive_batches
from visft_ds.config.schema import Precision
from visft_ds.config.task_schema import Stream
from visft_ds.costs.ledger import ACTIVATIONS, BUCKETS, GATHERED, GRADIENTS, TRANSIENT
from visft_ds.parallel import distributed
from visft_ds.planner.step import PlannedRun, Rehearsed, rehearse
from visft_ds.prepare.model import PUBLISHED_VOCABULARY
from visft_ds.tasks.spec import Content


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by part at the fullest moment of a step on the fullest rank."""

    weights: int  #: frozen and trained, what this rank holds between steps
    gradients: int
    optimizer: int  #: moments, and fp32 masters where the engine divides them
    buckets: int  #: in which ZeRO collects gradients
    gathered: int  #: ZeRO-3: whole weights for as long as they are needed
    activations: int  #: kept for the backward pass
    transient: int  #: on their way: results, criteria, the batch itself

    @property
    def total(self) -> int:
        """All parts."""
        return sum(asdict(self).values())

    def rows(self) -> list[tuple[str, str]]:
        """Rows for the parts, and the sum."""
        parts = [(name, size) for name, size in asdict(self).items() if size]
        return [(name, f"{size / 2**20:12,.1f} MiB") for name, size in [*parts, ("whole", self.total)]]


def plan_memory(
    config: ResolvedConfig,
    world_size: int,
    *,
    precision: Precision,
    task: str | None = None,
    vocabulary_size: int | None = None,
    device: torch.device | None = None,
    content: Content | None = None,
) -> MemoryPlan:
    """Peak memory of a rank of this run, by part.

    Args:
        world_size: number of processes.
        precision: what visft.model.precision means on the device; never "auto".
        task: or stream; None: the largest of the run's.
        vocabulary_size: of the captions; None: that of the published heads.
        device: where ranks compute, which need not exist here; None: this process's own.
        content: of the micro-batches; None: more than most have.

    Raises:
        ValueError: batches that cannot be divided, groups that match nothing, an unknown task.
    """
    run = run_of(config, world_size, precision, vocabulary_size, device, content)
    streams = config.visft.streams()
    if task is not None and task not in streams:
        raise ValueError(f"task {task!r}: this run has {', '.join(streams)}")
    chosen = streams.values() if task is None else [streams[task]]
    return max((plan_stream(run, stream) for stream in chosen), key=lambda plan: plan.total)


def run_of(
    config: ResolvedConfig,
    world_size: int,
    precision: Precision,
    vocabulary_size: int | None,
    device: torch.device | None,
    content: Content | None = None,
) -> PlannedRun:
    """Run to be planned; arguments as those of `plan_memory`."""
    return PlannedRun(
        config=config,
        batches=derive_batches(config, world_size),
        precision=precision,
        vocabulary_size=vocabulary_size or PUBLISHED_VOCABULARY,
        device=device or distributed.local_device(),
        content=content or Content(),
    )


def plan_stream(run: PlannedRun, stream: Stream) -> MemoryPlan:
    """The fullest moment of one kind of step."""
    stages = range(run.batches.stages) if run.batches.stages > 1 else [None]
    plans = [plan for stage in stages for plan in _plans(rehearse(run, stream, stage))]
    return max(plans, key=lambda plan: plan.total)


def _plans(found: Rehearsed) -> Iterator[MemoryPlan]:
    for moment in found.moments:
        yield MemoryPlan(
            weights=found.weights,
            gradients=moment[GRADIENTS],
            optimizer=found.optimizer,
            buckets=moment[BUCKETS],
            gathered=moment.get(GATHERED, 0),
            activations=moment[ACTIVATIONS],
            transient=moment[TRANSIENT],
        )
