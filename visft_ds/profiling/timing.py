"""Time of a step by part: hooks around the parts of a model and the calls of its engine.

The step itself is unchanged. Time outside of all hooked parts is the rest, so that the parts always sum to the step.
"""

from __future__ import annotations

import inspect
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from visft_ds.data.samples import Batch
from visft_ds.parallel.engine import ZeroEngine
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

Measured = TypeVar("Measured")


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


def synchronize(device: torch.device) -> None:
    """Wait until the device has done everything it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clock(device: torch.device) -> float:
    """Seconds: CPU time of this process, or the wall clock when a GPU has done what it was given."""
    synchronize(device)
    return time.perf_counter() if device.type == "cuda" else time.process_time()


def in_turn(names: Iterable[str], measure: Callable[[str], Measured], repeats: int) -> dict[str, list[Measured]]:
    """Measure all of them in every round, so that a machine whose speed drifts does so for all.

    What ran before leaves its mark on caches: with each round the order moves on by one.

    Args:
        repeats: rounds that count, after one to warm up.
    """
    order = list(names)
    found: dict[str, list[Measured]] = {name: [] for name in order}
    for turn in range(repeats + 1):
        order.append(order.pop(0))
        for name in order:
            measured = measure(name)
            if turn:
                found[name].append(measured)
    return found


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
    """Duration of a measured step, whole and by part."""

    seconds: float  #: wall time, waiting for data included
    parts: Mapping[str, float]  #: seconds; PARTS sum to `seconds`, MATCHER lies inside CRITERION


def divide(seconds: float, wait_seconds: float, measured: Mapping[str, float]) -> MeasuredStep:
    """A step by part: what was measured, in the order of PARTS, and the rest."""
    parts = {part: measured.get(part, 0.0) for part in PARTS} | {DATA_WAIT: wait_seconds}
    parts[REST] = seconds - sum(parts[part] for part in PARTS if part != REST)
    return MeasuredStep(seconds, parts | {MATCHER: measured.get(MATCHER, 0.0)})


@dataclass(frozen=True)
class Spread:
    """Repeated measurements of one number."""

    median: float
    low: float  #: first quartile
    high: float  #: third quartile
    least: float
    most: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0], values[0], values[0], 1)
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high, min(values), max(values), len(values))


@dataclass(frozen=True)
class CpuClock:
    """CPU time of this process and of all that descend from it since the clock was started.

    Living processes are counted in ticks of the system's clock, usually 10 ms. Looking for them takes milliseconds,
    which are not counted: this process is looked at last at the start, and first at the end.
    """

    living: float
    own: float

    @classmethod
    def start(cls) -> CpuClock:
        """Raises RuntimeError where there is no /proc."""
        living = _living_seconds()
        return cls(living, _own_seconds())

    def seconds(self) -> float:
        """Since the start."""
        own = _own_seconds()
        return own - self.own + _living_seconds() - self.living


def _own_seconds() -> float:
    """CPU time of this process, all its threads and its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def _living_seconds() -> float:
    """CPU time of living descendants, and of their children that have ended; a fork server's are grandchildren."""
    if not Path("/proc/self/stat").is_file():
        raise RuntimeError("this system has no /proc: the CPU time of worker processes cannot be measured here")
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except (FileNotFoundError, ProcessLookupError):  # it ended just now: its parent has its time
            continue
        fields = text.rpartition(")")[2].split()  # behind the name, which may contain blanks
        process = int(path.parent.name)
        parents[process] = int(fields[1])
        ticks[process] = sum(map(int, fields[11:15]))  # user, system, and both of children that were waited for
    descend = {os.getpid()}
    while more := {child for child, parent in parents.items() if parent in descend} - descend:
        descend |= more
    return sum(ticks[process] for process in descend - {os.getpid()}) / os.sysconf("SC_CLK_TCK")


def typical_parts(steps: Sequence[MeasuredStep]) -> dict[str, float]:
    """Mean of every part over the middle half of the steps, by duration; the parts sum to the mean of these steps.

    Medians taken part by part would not sum to any step.
    """
    ordered = sorted(steps, key=lambda step: step.seconds)
    cut = len(ordered) // 4
    middle = ordered[cut : len(ordered) - cut]
    return {part: statistics.fmean(step.parts[part] for step in middle) for part in middle[0].parts}
