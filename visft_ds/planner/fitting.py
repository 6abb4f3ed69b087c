"""Settings with which a configuration fits: suggestions, and recomputing that just fits, chosen before a start.

Every change is predicted to fit; the one that costs least time comes first.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from visft_ds.config import ResolvedConfig, changed, derive_batches
from visft_ds.config.task_schema import SHARED
from visft_ds.parallel import distributed
from visft_ds.planner.step import MemoryPlan, PlannedRun, plan_largest, plan_stream, run_of, trace_step
from visft_ds.prepare.model import choose_precision
from visft_ds.prepare.streams import known_vocabulary
from visft_ds.run.folder import recorded_config, saved_something

#: Of a GPU's memory, what a plan may fill: the CUDA context, libraries' workspaces and fragmentation take the rest.
MEMORY_SHARE = 0.92
#: (checkpoint_every, recompute), from the one that costs least time to the one that keeps least.
POLICIES = (
    (0, "block"),
    (4, "mlp"),
    (2, "mlp"),
    (1, "mlp"),
    (1, "all_but_attention"),
    (1, "block"),
)
#: A step that gathers or sends weights and tokens, over one that does not: assumed, it depends on the links.
_DIVIDED = 1.1


@dataclass(frozen=True)
class Suggestion:
    """Settings that fit."""

    settings: tuple[str, ...]  #: flags of visft train, e.g. "--set visft.model.checkpoint_every=1"
    memory: MemoryPlan
    relative_time: float  #: of a step, by its operations; 1.0: as now


def policy_settings(every: int, recompute: str) -> tuple[str, ...]:
    """Assignments that choose a policy of activation checkpointing."""
    settings = (f"visft.model.checkpoint_every={every}",)
    return (*settings, f"visft.model.recompute={recompute}") if every else settings


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
            try:
                changed_run = now.changed(candidate)
            except ValueError:
                continue  # its batches do not divide that way
            plans: list[MemoryPlan] = []
            for name in names:
                plans.append(plan_stream(changed_run, candidate.visft.streams()[name]))
                if plans[-1].total > capacity:
                    break
            else:
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
    model = config.visft.model
    for every, recompute in POLICIES:
        if every and (every, recompute) != (model.checkpoint_every, model.recompute):
            settings = policy_settings(every, recompute)
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
        yield ("--engine zero3",), changed(config, engine="zero3"), _DIVIDED
    for stages in (2, 4, 8):
        if world_size % stages == 0 and config.visft.model.precision != "fp16":
            settings = (f"pipeline.stages={stages}",)
            flags = ("--engine pipeline", *_flags(settings))
            yield flags, changed(config, settings, engine="pipeline"), _DIVIDED


# ---------------------------------------------------------------------------------- recomputing that just fits


def memory_of(device: torch.device) -> int:
    """Bytes that a plan may fill on this process's device: most of a GPU, or a process's part of the host's memory."""
    if device.type == "cuda":
        return int(MEMORY_SHARE * torch.cuda.get_device_properties(device).total_memory)
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(0.8 * host) // distributed.processes_here()


def settle_recompute(config: ResolvedConfig, out: Path) -> tuple[ResolvedConfig, str]:
    """The configuration with its policy decided, and why; nothing to decide without `visft.model.fit_memory`.

    A run that goes on keeps the policy it began with: memory changes, and so would results in their last bits.

    Raises:
        ValueError: no policy fits; says what else helps.
    """
    model = config.visft.model
    if not model.fit_memory:
        return config, "as configured"
    if saved_something(out):
        before = recorded_config(out).visft.model
        if before.fit_memory:
            return changed(config, policy_settings(before.checkpoint_every, before.recompute)), "as the run began"
    device, processes = distributed.local_device(), distributed.world_size()
    precision, _ = choose_precision(model.precision, device)
    vocabulary = known_vocabulary(config.visft)
    size = vocabulary.size if vocabulary else None
    capacity = model.memory_limit or memory_of(device)
    for every, recompute in POLICIES:
        candidate = changed(config, policy_settings(every, recompute))
        run = run_of(candidate, processes, precision, size, device)
        plan = plan_largest(run)
        if plan.total <= capacity:
            return candidate, f"the fastest that fits: {_mib(plan.total)} of {_mib(capacity)}, as predicted"
    others = fitting_settings(run, capacity)
    help_ = "; ".join(" ".join(suggestion.settings) for suggestion in others) or "a smaller --model, or more memory"
    raise ValueError(
        f"visft.model.fit_memory: even with every block computed again a step needs {_mib(plan.total)} of "
        f"{_mib(capacity)}, as predicted. What helps: {help_}"
    )


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"
