"""Time spent in collective operations, from torch's profiler around one step.

With gloo these are the intervals from a call to its result, waiting for slower ranks included; with NCCL the run time
of its kernels, which may lie beside computation. Either way they are inside other parts of the step (the backward pass,
the optimizer, gathering weights), so they are reported beside the parts and not as one of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class Communication:
    """Collectives of one step."""

    seconds: float  #: during which at least one of them was under way
    calls: Mapping[str, int] = field(default_factory=dict)  #: by name
    backend: str = "gloo"


def measure_communication(step: Callable[[], object], device: torch.device) -> Communication:
    """Run a step under the profiler."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it reports its own starts and stops
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities, acc_events=False) as profiler:
        step()
        if cuda:
            torch.cuda.synchronize(device)
    events: list[Any] = list(profiler.events())
    prefix, kind = ("nccl", "CUDA") if cuda else ("gloo:", "CPU")
    found = [event for event in events if event.name.startswith(prefix) and event.device_type.name == kind]
    calls: dict[str, int] = {}
    for event in found:
        name = event.name.removeprefix("gloo:").removeprefix("ncclDevKernel_").split("(")[0]
        calls[name] = calls.get(name, 0) + 1
    microseconds = covered((event.time_range.start, event.time_range.end) for event in found)
    return Communication(microseconds / 1e6, calls, "nccl" if cuda else "gloo")


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
