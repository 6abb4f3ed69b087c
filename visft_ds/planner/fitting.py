"""Suggestions of settings with which a configuration fits.

Every change is predicted to fit; the one that costs least time comes first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from visft_ds.config import ResolvedConfig, changed, derive_batches
from visft_ds.config.task_schema import SHARED
from visft_ds.planner.step import MemoryPlan, PlannedRun, plan_stream, trace_step

#: Of a GPU's memory, what a plan may fill: the CUDA context, libraries' workspaces and fragmentation take the rest.
MEMORY_SHARE = 0.92
#: From the one that computes least to the one that keeps least.
_POLICIES = ("none", "mlp", "block")
#: A step that gathers or sends weights and tokens, over one that does not: assumed, it depends on the links.
_DIVIDED = 1.1


@dataclass(frozen=True)
class Suggestion:
    """Settings that fit."""

    settings: tuple[str, ...]  #: flags of visft train, e.g. "--set visft.model.recompute=block"
    memory: MemoryPlan
    relative_time: float  #: of a step, by its operations; 1.0: as now


def policies_of(config: ResolvedConfig) -> tuple[str, ...]:
    """Values of visft.model.recompute that change what a step keeps and none of its results, of `_POLICIES`."""
    model = config.visft.model
    if config.visft.stage == 1:
        return _POLICIES[:1]  # a frozen backbone keeps nothing
    if model.timm is not None:
        return "none", "block"
    return _POLICIES


def recompute_setting(policy: str) -> str:
    """Assignment that states a policy."""
    return f"visft.model.recompute={policy}"


def fitting_settings(now: PlannedRun, capacity: int) -> list[Suggestion]:
    """At most three changes after which the fullest rank of a run holds no more than `capacity` bytes; best first.

    Each is of another kind: recomputing, fewer images at once, another engine. Empty where none of them is enough.
    """
    config, world_size = now.config, now.batches.processes
    # What fits the largest kind of step usually fits the others, so that it is asked first.
    streams = config.visft.streams()
    names = sorted(streams, key=lambda name: plan_stream(now, streams[name]).total, reverse=True)
    found = []
    for kind in (_recomputing(config), _fewer_images(config, world_size), _engines(config, world_size)):
        for flags, candidate, factor in kind:
            plans: list[MemoryPlan] = []
            try:
                changed_run = now.changed(candidate)
                for name in names:
                    plans.append(plan_stream(changed_run, candidate.visft.streams()[name]))
                    if plans[-1].total > capacity:
                        break
            except ValueError:
                continue  # its batches do not divide that way, or there are more stages than layers
            if plans[-1].total <= capacity:
                time = factor * (operations(changed_run) / operations(now) if factor == 1 else 1)
                found.append(Suggestion(flags, max(plans, key=lambda memory: memory.total), time))
                break
    return sorted(found, key=lambda suggestion: suggestion.relative_time)[:3]


def operations(run: PlannedRun) -> float:
    """Of one rank's mean step, forward and backward."""
    streams = run.config.visft.streams().values()
    all_shares = sum(stream.share for stream in streams)
    return sum(
        stream.share / all_shares * run.batches.accumulation * count * work.operations
        for stream in streams
        for work, count in trace_step(run, stream).work.items()
    )


Candidates = Iterator[tuple[tuple[str, ...], ResolvedConfig, float]]  #: flags, what they lead to, relative time


def _flags(settings: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"--set {setting}" for setting in settings)


def _recomputing(config: ResolvedConfig) -> Candidates:
    for policy in policies_of(config):
        if policy not in ("none", config.visft.model.recompute):
            settings = (recompute_setting(policy),)
            yield _flags(settings), changed(config, settings), 1.0


def _fewer_images(config: ResolvedConfig, world_size: int) -> Candidates:
    now = derive_batches(config, world_size).micro
    halvings = 1
    while any(count >> halvings for count in now.values()):
        settings = tuple(
            f"{'visft.shared' if name == SHARED else f'visft.tasks.{name}'}.micro_batch={max(1, count >> halvings)}"
            for name, count in now.items()
            if count > 1
        )
        yield _flags(settings), changed(config, settings), 1.0
        halvings += 1


def _engines(config: ResolvedConfig, world_size: int) -> Candidates:
    if config.pipeline_stages > 1:
        return
    if world_size > 1 and config.deepspeed["zero_optimization"]["stage"] < 3:
        for flags, candidate in under_engine(config, "zero3"):
            yield flags, candidate, _DIVIDED
    for stages in (2, 4, 8):
        if world_size % stages == 0:
            for flags, candidate in under_engine(config, "pipeline", (f"pipeline.stages={stages}",)):
                yield flags, candidate, _DIVIDED


def under_engine(
    config: ResolvedConfig, engine: str, settings: Sequence[str] = ()
) -> Iterator[tuple[tuple[str, ...], ResolvedConfig]]:
    """(flags, configuration) under another engine; nothing where the engine refuses what is configured."""
    try:
        candidate = changed(config, settings, engine=engine)
    except ValueError:
        return  # a pipeline takes no model of timm, ZeRO-3 no compiled blocks
    yield (f"--engine {engine}", *_flags(settings)), candidate
