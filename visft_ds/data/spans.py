"""Time spent on samples: named spans of work, measured in each thread and summed on request.

A span costs a third of a microsecond, so the data path carries them always: the log of a run and `visft
profile --loader` read the same numbers. Processor time costs more to ask for and is measured on request only.

    with span("decode"):
        pixels = decode_image(data)
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from types import TracebackType

#: Every name in use, in the order in which a sample meets them.
SPANS = ("features", "read", "crc", "decode", "labels", "resize", "boxes", "masks", "tokens", "collate")


@dataclass(frozen=True)
class Spent:
    """Cost of a kind of work so far."""

    count: int = 0
    wall: float = 0.0  #: seconds
    cpu: float = 0.0  #: seconds of the processors, 0 unless `measure_cpu` was called before

    def __add__(self, other: Spent) -> Spent:
        return Spent(self.count + other.count, self.wall + other.wall, self.cpu + other.cpu)

    def __sub__(self, other: Spent) -> Spent:
        return Spent(self.count - other.count, self.wall - other.wall, self.cpu - other.cpu)


_threads: list[dict[str, list[float]]] = []
_lock = threading.Lock()


class _Local(threading.local):
    def __init__(self) -> None:
        self.table: dict[str, list[float]] = {name: [0.0, 0.0, 0.0] for name in SPANS}
        with _lock:
            _threads.append(self.table)  # outlives its thread: what it has done stays counted


_local = _Local()
_with_cpu = False


def measure_cpu() -> None:
    """From now on, measure the processor time of spans too (in this process and in worker processes it starts)."""
    global _with_cpu
    _with_cpu = True


def measures_cpu() -> bool:
    """Return True if `measure_cpu` was called."""
    return _with_cpu


class span:  # lower case: used like a function
    """Add the time between entering and leaving to a name of `SPANS`. Spans do not nest."""

    __slots__ = ("_cpu", "_name", "_wall")

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        if _with_cpu:
            self._cpu = time.thread_time()
        self._wall = time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        entry = _local.table[self._name]
        entry[1] += time.perf_counter() - self._wall
        entry[0] += 1
        if _with_cpu:
            entry[2] += time.thread_time() - self._cpu


def spent() -> dict[str, Spent]:
    """Cost of each span in this process since it began, over all its threads."""
    with _lock:
        tables = list(_threads)
    return {
        name: sum((Spent(int(c), wall, cpu) for c, wall, cpu in (table[name] for table in tables)), Spent())
        for name in SPANS
    }
