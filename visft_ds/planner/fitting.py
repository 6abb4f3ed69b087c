"""What to change so that a configuration fits: concrete settings, each predicted to fit, the fastest first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from visft_ds.config import ResolvedConfig, changed, derive_batches
from visft_ds.config.schema import Precision
from visft_ds.config.task_schema import SHARED
from visft_ds.planner.memory import MemoryPlan, plan_memory

#: (checkpoint_every, recompute), from the one that costs least time to the one that keeps least.
POLICIES = (
    (0, "block"),
    (4, "mlp"),
    (3, "mlp"),
    (2, "mlp"),
    (1, "mlp"),
    (2, "block"),
    (1, "all_but_attention"),
    (1, "block"),
)


@dataclass(frozen=True)
class Suggestion:
    """One way to fit."""

    settings: tuple[str, ...]  #: flags of launchers/train.py, e.g. "--set visft.model.checkpoint_every=1"
    memory: MemoryPlan
    relative_time: float  #: of a step, predicted; 1.0: as now


def policy_settings(every: int, recompute: str) -> tuple[str, ...]:
    """Assignments that choose a policy of activation checkpointing."""
    return (f"visft.model.checkpoint_every={every}", *((f"visft.model.recompute={recompute}",) * (every > 0)))


def fitting_settings(
    config: ResolvedConfig,
    world_size: int,
    capacity: int,
    *,
    precision: Precision,
    vocabulary_size: int | None = None,
    device: torch.device | None = None,
) -> list[Suggestion]:
    """At most three changes after which the fullest rank holds no more than `capacity` bytes; best first.

    Each is of another kind: recomputing, fewer images at once, another engine. Empty where none of them is enough.
    """
    streams = list(config.visft.streams())

    def plan(which: str, of: ResolvedConfig) -> MemoryPlan:
        return plan_memory(
            of, world_size, precision=precision, task=which, vocabulary_size=vocabulary_size, device=device
        )

    # What fits the largest kind of step usually fits the others, so that it is asked first.
    streams.sort(key=lambda name: plan(name, config).total, reverse=True)
    found = []
    for kind in (_recomputing(config), _fewer_images(config, world_size), _engines(config, world_size)):
        for flags, candidate, time in kind:
            try:
                derive_batches(candidate, world_size)
            except ValueError:
                continue  # its batches do not divide that way
            plans = []
            for name in streams:
                plans.append(plan(name, candidate))
                if plans[-1].total > capacity:
                    break
            else:
                found.append(Suggestion(flags, max(plans, key=lambda memory: memory.total), time))
                break
    return sorted(found, key=lambda suggestion: suggestion.relative_time)[:3]


Candidates = Iterator[tuple[tuple[str, ...], ResolvedConfig, float]]


def _flags(settings: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"--set {setting}" for setting in settings)


def _recomputing(config: ResolvedConfig) -> Candidates:
    model = config.visft.model
    times = {"mlp": 0.27, "block": 0.33, "all_but_attention": 0.3}
    for every, recompute in POLICIES:
        if every and (every, recompute) != (model.checkpoint_every, model.recompute):
            settings = policy_settings(every, recompute)
            yield _flags(settings), changed(config, settings), 1 + times[recompute] / every


def _fewer_images(config: ResolvedConfig, world_size: int) -> Candidates:
    now = derive_batches(config, world_size).micro
    halvings = 1
    while any(count >> halvings for count in now.values()):
        settings = tuple(
            f"{'visft.shared' if name == SHARED else f'visft.tasks.{name}'}.micro_batch={max(1, count >> halvings)}"
            for name, count in now.items()
            if count > 1
        )
        if settings:
            yield _flags(settings), changed(config, settings), 1.02
        halvings += 1


def _engines(config: ResolvedConfig, world_size: int) -> Candidates:
    if config.pipeline_stages == 1 and world_size > 1 and config.deepspeed["zero_optimization"]["stage"] < 3:
        yield ("--engine zero3",), changed(config, engine="zero3"), 1.1
