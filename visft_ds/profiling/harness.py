"""Harness of all measurements: cases in turn, spreads and ratios, processor time, circumstances of a record."""

from __future__ import annotations

import os
import resource
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch

from visft_ds.costs.hardware import describe
from visft_ds.monitor.metrics import git_revision, versions

Key = TypeVar("Key", bound=Hashable)
Measured = TypeVar("Measured")

# --------------------------------------------------------------------------------------------------- measuring


def synchronize(device: torch.device) -> None:
    """Wait until the device has done everything it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clock(device: torch.device) -> float:
    """Seconds: CPU time of this process, or the wall clock when a GPU has done what it was given."""
    synchronize(device)
    return time.perf_counter() if device.type == "cuda" else time.process_time()


def in_turn(cases: Iterable[Key], measure: Callable[[Key], Measured], repeats: int) -> dict[Key, list[Measured]]:
    """Measure all cases in every round, so that a machine whose speed drifts does so for all.

    What ran before leaves its mark on caches: with each round the order moves on by one.

    Args:
        repeats: rounds that count, after one to warm up.
    """
    order = list(dict.fromkeys(cases))
    found: dict[Key, list[Measured]] = {case: [] for case in order}
    for turn in range(repeats + 1):
        order.append(order.pop(0))
        for case in order:
            measured = measure(case)
            if turn:
                found[case].append(measured)
    return found


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
    def of(cls, values: Iterable[float]) -> Spread:
        """Of at least one value."""
        found = list(values)
        low, median, high = statistics.quantiles(found, n=4, method="inclusive") if len(found) > 1 else 3 * found
        return cls(median, low, high, min(found), max(found), len(found))


def spread(values: Iterable[float]) -> dict[str, Any]:
    """`Spread` as a record has it."""
    return asdict(Spread.of(values))


def ratio(over: Iterable[float], under: Iterable[float]) -> dict[str, Any]:
    """Spread of ratios, each formed inside one round: they mean something where times do not."""
    return spread(a / b for a, b in zip(over, under, strict=True))


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
        """Start to count."""
        living = _living_seconds()
        return cls(living, _own_seconds())

    def seconds(self) -> float:
        """Since the start."""
        process_seconds = _own_seconds()
        return process_seconds - self.own + _living_seconds() - self.living


def _own_seconds() -> float:
    """CPU time of this process, all its threads and its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def _living_seconds() -> float:
    """CPU time of living descendants, and of their children that have ended; a fork server's are grandchildren."""
    found = 0.0
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it ended just now: its parent has its time
            times = process.cpu_times()
            found += times.user + times.system + times.children_user + times.children_system
    return found


# ----------------------------------------------------------------------------------------------------- records


def circumstances(load: Sequence[float] | None, device: torch.device | None = None) -> dict[str, Any]:
    """Time, versions, commit, hardware and load, under the names that all records have.

    Args:
        load: `os.getloadavg()` from before the measurement, which is a load itself; None: not recorded.
        device: what was measured on; None: the cores of this machine.
    """
    return {
        "measured": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": versions(),
        "git": git_revision(Path(__file__).resolve().parents[2]),
        **({"cores": os.cpu_count()} if device is None else {"hardware": describe(device)}),
        **({} if load is None else {"load": list(load)}),
    }


def measured_on(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Device of a record with hardware, and its load where it has one, as rows of a table."""
    hardware = record["hardware"]
    text = f"{hardware['device']}, {hardware['threads']} CPU threads of {hardware['cores']} cores"
    return [("device", text), *([load_row(record)] if "load" in record else [])]


def load_row(record: Mapping[str, Any], text: str = "processes in the last 1, 5, 15 minutes before") -> tuple[str, str]:
    """Load of a record, as a row of a table."""
    return "load", f"{', '.join(f'{value:.2f}' for value in record['load'])} {text}"


def quartiles(numbers: Mapping[str, Any], digits: int, scale: float = 1.0) -> str:
    """Quartiles of a recorded spread, in fixed digits."""
    return f"{scale * numbers['low']:.{digits}f} .. {scale * numbers['high']:.{digits}f}"


def with_quartiles(numbers: Mapping[str, Any], digits: int, scale: float = 1.0, unit: str = "", gap: str = "  ") -> str:
    """Median and quartiles of a recorded spread, in fixed digits."""
    return f"{scale * numbers['median']:.{digits}f}{unit}{gap}({quartiles(numbers, digits, scale)})"
