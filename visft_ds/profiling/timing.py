"""Time of a step by part: hooks around the parts of a model and the calls of its engine; its collectives.

The step itself is unchanged. Time outside of all hooked parts is the rest, so that the parts always sum to the step.
"""

from __future__ import annotations

import inspect
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from visft_ds.data.samples import Batch
from visft_ds.parallel.engine import ZeroEngine
from visft_ds.profiling.harness import synchronize
from visft_ds.tasks.spec import Criterion

#: Parts of a step that do not overlap, in the order in which they are printed. "data wait" and "rest" have no hook.
DATA_WAIT, BACKBONE, HEAD, CRITERION, BACKWARD, OPTIMIZER, REST = (
    "data wait",
    "backbone forward",
    "head forward",
    "criterion",
    "backward",
    "optimizer",
    "rest",
)
PARTS = (DATA_WAIT, BACKBONE, HEAD, CRITERION, BACKWARD, OPTIMIZER, REST)
#: Lies inside the criterion and is part of its time.
MATCHER = "matcher"


class Meter(Protocol):
    """Told when a part begins and ends; parts may nest, and may occur several times in a step."""

    def start(self, part: str) -> None: ...

    def stop(self, part: str) -> None: ...


class Stopwatch:
    """Seconds by part: CUDA events on a GPU (recorded in the stream, read once at the end), else the wall clock."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: dict[str, list[Any]] = {}

    def start(self, part: str) -> None:
        self._marks.setdefault(part, []).append(self._now())

    def stop(self, part: str) -> None:
        self._marks[part].append(self._now())

    def seconds(self) -> dict[str, float]:
        """Sum of every part since the last call; waits for the device."""
        synchronize(self._device)
        sums = {
            part: sum(self._between(*pair) for pair in zip(marks[::2], marks[1::2], strict=True))
            for part, marks in self._marks.items()
        }
        self._marks.clear()
        return sums

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, first: Any, last: Any) -> float:
        return float(first.elapsed_time(last)) / 1000 if self._device.type == "cuda" else float(last - first)


class _MeteredCriterion:
    """A criterion that reports its calls; criteria are plain callables, without the hooks of a module."""

    def __init__(self, criterion: Criterion, meter: Meter) -> None:
        self._criterion = criterion
        self._meter = meter
        self.weights = criterion.weights

    def count(self, batch: Batch) -> dict[str, float]:
        return self._criterion.count(batch)

    def __call__(
        self, output: Any, targets: Any, loss_denominators: Mapping[str, Tensor], image_ids: Tensor | None = None
    ) -> dict[str, Tensor]:
        self._meter.start(CRITERION)
        losses = self._criterion(output, targets, loss_denominators, image_ids)
        self._meter.stop(CRITERION)
        return losses


@contextmanager
def metered(engine: ZeroEngine, meter: Meter) -> Iterator[None]:
    """Hook every part of the engine's steps to a meter; nothing of it stays behind."""
    module = engine.module
    with ExitStack() as stack:
        for part, owner in ((BACKBONE, module.backbone), *((HEAD, head) for head in module.heads.values())):
            before = owner.register_forward_pre_hook(lambda *_, part=part: meter.start(part), prepend=True)
            after = owner.register_forward_hook(lambda *_, part=part: meter.stop(part))
            stack.callback(before.remove)
            stack.callback(after.remove)
        for task, criterion in list(module.criteria.items()):
            module.criteria[task] = _MeteredCriterion(criterion, meter)
            stack.callback(module.criteria.__setitem__, task, criterion)
            for owner_module, name, function in matchers(criterion):
                setattr(owner_module, name, _wrapped(function, meter, MATCHER))
                stack.callback(setattr, owner_module, name, function)
        for name, part in (("backward", BACKWARD), ("step", OPTIMIZER)):
            # An attribute of the instance goes before the method of its class.
            setattr(engine.deepspeed, name, _wrapped(getattr(engine.deepspeed, name), meter, part))
            stack.callback(delattr, engine.deepspeed, name)
        yield


def matchers(criterion: Criterion) -> list[tuple[Any, str, Callable[..., Any]]]:
    """Functions called match... that the criterion's file imported from another file of the tasks: (file, name, it)."""
    file = sys.modules[type(criterion).__module__]
    return [
        (file, name, value)
        for name, value in vars(file).items()
        if name.startswith("match") and inspect.isfunction(value) and value.__module__.startswith("visft_ds.tasks.")
    ]


def _wrapped(function: Callable[..., Any], meter: Meter, part: str) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        meter.start(part)
        result = function(*arguments, **named)
        meter.stop(part)
        return result

    return call


@dataclass(frozen=True)
class MeasuredStep:
    """Duration of a measured step, in all and by part."""

    seconds: float  #: wall time, waiting for data included
    parts: Mapping[str, float]  #: seconds; PARTS sum to `seconds`, MATCHER lies inside CRITERION


def divide(seconds: float, wait_seconds: float, measured: Mapping[str, float]) -> MeasuredStep:
    """A step by part: what was measured, in the order of PARTS, and the rest."""
    parts = {part: measured.get(part, 0.0) for part in PARTS} | {DATA_WAIT: wait_seconds}
    parts[REST] = seconds - sum(parts[part] for part in PARTS if part != REST)
    return MeasuredStep(seconds, parts | {MATCHER: measured.get(MATCHER, 0.0)})


def typical_parts(steps: Sequence[MeasuredStep]) -> dict[str, float]:
    """Mean of every part over the middle half of the steps, by duration; the parts sum to the mean of these steps.

    Medians taken part by part would not sum to any step.
    """
    ordered = sorted(steps, key=lambda step: step.seconds)
    cut = len(ordered) // 4
    middle = ordered[cut : len(ordered) - cut]
    return {part: statistics.fmean(step.parts[part] for step in middle) for part in middle[0].parts}


# ----------------------------------------------------------------------------------------------- communication


@dataclass(frozen=True)
class Communication:
    """Collectives of one step, inside its other parts (the backward pass, the optimizer, gathering weights).

    With gloo these are the intervals from a call to its result, waiting for slower ranks included; with NCCL the run
    time of its kernels, which may lie beside computation. So they are reported beside the parts.
    """

    seconds: float  #: during which at least one of them was under way
    calls: Mapping[str, int] = field(default_factory=dict)  #: by name
    backend: str = "gloo"


def measure_communication(step: Callable[[], object], device: torch.device) -> Communication:
    """Run a step under the profiler."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it reports its own starts and stops
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities, acc_events=True) as profiler:
        step()
        synchronize(device)
    events: list[Any] = list(profiler.events())
    prefix, kind = ("nccl", "CUDA") if cuda else ("gloo:", "CPU")
    found = [event for event in events if event.name.startswith(prefix) and event.device_type.name == kind]
    if cuda:  # beside kernels there are copies of the ranges in which the host started them
        found = [event for event in found if not event.is_user_annotation]
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
