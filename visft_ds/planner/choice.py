"""Recomputing that just fits: the policy of activation checkpointing that costs least time, chosen before a start."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from visft_ds.config import ResolvedConfig, changed
from visft_ds.parallel import distributed
from visft_ds.planner.cluster import MEMORY_SHARE
from visft_ds.planner.fitting import POLICIES, fitting_settings, policy_settings
from visft_ds.planner.memory import plan_memory
from visft_ds.prepare.model import choose_precision
from visft_ds.prepare.streams import known_vocabulary
from visft_ds.run.folder import recorded_config, saved_something


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
        plan = plan_memory(candidate, processes, precision=precision, vocabulary_size=size, device=device)
        if plan.total <= capacity:
            return candidate, f"the fastest that fits: {_mib(plan.total)} of {_mib(capacity)}, as predicted"
    others = fitting_settings(candidate, processes, capacity, precision=precision, vocabulary_size=size, device=device)
    help_ = "; ".join(" ".join(one.settings) for one in others) or "a smaller --model, or more memory"
    raise ValueError(
        f"visft.model.fit_memory: even with every block computed again a step needs {_mib(plan.total)} of "
        f"{_mib(capacity)}, as predicted. What helps: {help_}"
    )


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"
