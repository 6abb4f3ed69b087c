"""Profile of the data path: CPU time of a sample by part, throughput by workers, and the limit set by the GIL.

The parts are the spans of `visft_ds.data.spans`, measured in the loader that trains. Time outside of them (plans,
random numbers, objects of Python) is the rest, so the parts always add up to the CPU time of the process.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import simplejpeg
import torch.nn.functional
from isal import isal_zlib

from visft_ds.data.dataset import SamplePipeline
from visft_ds.data.shards import ROLES, Role, ShardReader
from visft_ds.data.spans import SPANS, Spent, measure_cpu
from visft_ds.data.workers import WorkerKind
from visft_ds.monitor.console import Section
from visft_ds.profiling.data_source import MeasuredSet, facts_rows, our_loader
from visft_ds.profiling.timing import CpuClock, Spread

FORMAT, VERSION = "visft_ds data", 1
REST = "rest"
#: The calls that do most of the work and release the interpreter lock meanwhile (a test checks that).
RELEASING: tuple[tuple[Any, str], ...] = (
    (os, "pread"),
    (isal_zlib, "crc32"),
    (simplejpeg, "decode_jpeg"),
    (torch.nn.functional, "interpolate"),
)


@dataclass(frozen=True)
class DataOptions:
    """Options of the measurement. Raises ValueError for values out of range."""

    threads: tuple[int, ...] = (0, 1, 2)
    processes: tuple[int, ...] = (1, 2)
    role: Role = "both"
    images: int = 512  #: of one measurement, at least one batch
    repeats: int = 5
    step_ms: float = 0.0  #: how long the consumer is busy with each step, without using the CPU

    def __post_init__(self) -> None:
        for name, least in (("threads", 0), ("processes", 1)):
            given = getattr(self, name)
            if min(given, default=least) < least or len(set(given)) < len(given):
                raise ValueError(f"--{name} {' '.join(map(str, given))}: give numbers from {least} up, each once")
        if not self.threads:
            raise ValueError("--threads: give at least one number")
        if self.role not in ROLES:
            raise ValueError(f"--role {self.role}: give one of {', '.join(ROLES)}")
        for name in ("images", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least 1")
        if not 0 <= self.step_ms < 60_000:
            raise ValueError(f"--step-ms {self.step_ms:g} must be from 0 to 60000")

    @property
    def workers(self) -> list[tuple[WorkerKind, int]]:
        """Kind and number of everything that is measured."""
        return [*(("threads", one) for one in self.threads), *(("processes", one) for one in self.processes)]


@dataclass(frozen=True)
class StreamData:
    """Preprocessing of the samples of a stream of a configuration: pipeline and batch size."""

    name: str
    pipeline: SamplePipeline
    batch: int  #: samples of a step


@dataclass(frozen=True)
class _Pass:
    """Cost of consecutive steps of the loader: bytes, CPU, wall-clock and waiting seconds, and spans by part."""

    samples: int
    steps: int
    bytes: int  #: of images and labels, as the role reads them
    cpu: float  #: seconds of this process and its workers
    wall: float  #: seconds
    wait: float  #: seconds in which the consumer waited
    parts: Mapping[str, Spent]


def measure_data(data: MeasuredSet, streams: Sequence[StreamData], options: DataOptions) -> dict[str, Any]:
    """Measure every stream with all kinds and numbers of workers in turn; returns a record of JSON values.

    Raises ValueError where the set is smaller than a batch.
    """
    with ShardReader(data.manifest) as reader:
        measured = {stream.name: _measure_stream(data, reader, stream, options) for stream in streams}
    return {
        "format": FORMAT,
        "version": VERSION,
        "options": {**asdict(options), "threads": list(options.threads)},
        "set": data.facts(),
        "streams": measured,
    }


def _measure_stream(data: MeasuredSet, reader: ShardReader, stream: StreamData, options: DataOptions) -> dict[str, Any]:
    count = max(1, options.images // stream.batch)
    passes: dict[str, list[_Pass]] = {_name(*workers): [] for workers in options.workers}
    released = []
    for repeat in range(options.repeats + 1):
        for workers in options.workers:
            one = _pass(data, reader, stream, options, *workers, start=repeat * count, count=count)
            if repeat:  # the first one brings files and code into memory
                passes[_name(*workers)].append(one)
        with _released() as inside:
            alone = _pass(data, reader, stream, options, "threads", 0, start=repeat * count, count=count)
        if repeat:
            released.append(sum(inside) / alone.cpu)
    first = next(iter(passes))
    return {
        "batch": stream.batch,
        "steps": count,
        "parts_by": first,
        "parts": _parts(passes[first]),
        "by_workers": {name: _rates(found) for name, found in passes.items()},
        "released_share": asdict(Spread.of(released)),
    }


def _pass(
    data: MeasuredSet,
    reader: ShardReader,
    stream: StreamData,
    options: DataOptions,
    workers: WorkerKind,
    number: int,
    *,
    start: int,
    count: int,
) -> _Pass:
    """Run `count` steps from `start` on and measure their cost."""
    measure_cpu()
    loader = our_loader(
        data,
        reader,
        stream.pipeline,
        stream.batch,
        workers=workers,
        num_workers=number,
        role=options.role,
        name=stream.name,
    )
    sizes = np.sum([data.rows[name] for name in _columns(options.role)], axis=0)
    before, clock, wall = loader.spent(), CpuClock.start(), time.perf_counter()
    samples = size = 0
    wait = 0.0
    for whole, _ in loader.steps(start, start + count):
        wait += loader.wait_seconds
        samples += len(whole.indices)
        size += int(sizes[whole.indices].sum())
        if options.step_ms:
            time.sleep(options.step_ms / 1000)
    wall, cpu = time.perf_counter() - wall, clock.seconds()
    after = loader.spent()
    parts = {name: after[name] - before[name] for name in SPANS}
    return _Pass(samples, count, size, cpu, wall, wait, parts)


def _name(workers: WorkerKind, number: int) -> str:
    return f"{number} {workers}"


def _columns(role: Role) -> tuple[str, ...]:
    """The columns of the index with the sizes of what a role reads."""
    return {"both": ("image_size", "label_size"), "images": ("image_size",), "labels": ("label_size",)}[role]


@contextmanager
def _released() -> Iterator[list[float]]:
    """Collect the CPU seconds of every call in `RELEASING` inside this context, of the calling thread only."""
    inside: list[float] = []
    with ExitStack() as stack:
        for owner, name in RELEASING:
            function = getattr(owner, name)
            setattr(owner, name, _timed(function, inside))
            stack.callback(setattr, owner, name, function)
        yield inside


def _timed(function: Callable[..., Any], inside: list[float]) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        began = time.thread_time()
        result = function(*arguments, **named)
        inside.append(time.thread_time() - began)
        return result

    return call


# ------------------------------------------------------------------------------------------------------- summary


def _parts(passes: Sequence[_Pass]) -> dict[str, Any]:
    """CPU seconds a sample and shares by part, the rest included; parts that did not occur are left out."""
    names = [name for name in SPANS if passes[0].parts[name].count]
    found: dict[str, Any] = {}
    for name in [*names, REST]:
        seconds = [one.parts[name].cpu if name != REST else _rest(one) for one in passes]
        found[name] = {
            "cpu_seconds": asdict(Spread.of([s / one.samples for s, one in zip(seconds, passes, strict=True)])),
            "share": asdict(Spread.of([s / one.cpu for s, one in zip(seconds, passes, strict=True)])),
        }
    return found


def _rest(one: _Pass) -> float:
    return one.cpu - sum(part.cpu for part in one.parts.values())


def _rates(passes: Sequence[_Pass]) -> dict[str, Any]:
    values = {
        "cpu_seconds_per_sample": [one.cpu / one.samples for one in passes],
        "samples_per_cpu_second": [one.samples / one.cpu for one in passes],
        "samples_per_second": [one.samples / one.wall for one in passes],
        "wait_seconds_per_step": [one.wait / one.steps for one in passes],
        "wait_share": [one.wait / one.wall for one in passes],
        "bytes_per_second": [one.bytes / one.wall for one in passes],
    }
    return {name: asdict(Spread.of(spread)) for name, spread in values.items()} | {
        "bytes_per_sample": sum(one.bytes for one in passes) / sum(one.samples for one in passes)
    }


# -------------------------------------------------------------------------------------------------------- tables


def make_title(record: Mapping[str, Any]) -> str:
    """Title of the tables: streams, data set and role."""
    role = {"both": "", "images": ", pictures only", "labels": ", labels only"}[record["options"]["role"]]
    return f"data path: {', '.join(record['streams'])} on {record['set']['name']}{role}"


def make_sections(record: Mapping[str, Any]) -> list[Section]:
    """The record as tables: what was read; of each stream the parts, the workers and the interpreter lock."""
    options = record["options"]
    load = ", ".join(f"{value:.2f}" for value in record["load"])
    facts = [
        *facts_rows(record["set"]),
        ("load", f"{load} before, {record['cores']} cores"),
        ("repeats", f"{options['repeats']} after 1 to warm up, the kinds of workers in turn"),
        ("consumer", f"busy for {options['step_ms']:g} ms with each step" if options["step_ms"] else "only waits"),
    ]
    sections = [Section("on", facts)]
    for name, numbers in record["streams"].items():
        head = f"{name}, {numbers['steps']} steps of {numbers['batch']}"
        columns = ("", "CPU us a sample", "quartiles", "share of CPU")
        sections.append(Section(f"{head}: where the time goes, {numbers['parts_by']}", _part_rows(numbers), columns))
        wide = ("workers", "CPU ms", "quartiles", "samples per CPU-second", "samples a second", "MB/s", "wait")
        rows = [_worker_row(name, rates) for name, rates in numbers["by_workers"].items()]
        sections.append(Section(f"{head}: workers", rows, wide))
        sections.append(Section(f"{head}: the interpreter lock", _lock_rows(numbers)))
    return sections


def _part_rows(numbers: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    rows = []
    for part, found in numbers["parts"].items():
        cpu = found["cpu_seconds"]
        quartiles = f"{1e6 * cpu['low']:.0f} .. {1e6 * cpu['high']:.0f}"
        rows.append((part, f"{1e6 * cpu['median']:9.1f}", quartiles, f"{100 * found['share']['median']:6.2f} %"))
    cpu = numbers["by_workers"][numbers["parts_by"]]["cpu_seconds_per_sample"]
    quartiles = f"{1e6 * cpu['low']:.0f} .. {1e6 * cpu['high']:.0f}"
    return [*rows, ("whole", f"{1e6 * cpu['median']:9.1f}", quartiles, f"{100:6.2f} %")]


def _worker_row(name: str, rates: Mapping[str, Any]) -> tuple[str, ...]:
    cpu, wait = rates["cpu_seconds_per_sample"], rates["wait_seconds_per_step"]["median"]
    return (
        name,
        f"{1000 * cpu['median']:.3f}",
        f"{1000 * cpu['low']:.3f} .. {1000 * cpu['high']:.3f}",
        f"{rates['samples_per_cpu_second']['median']:.0f}",
        f"{rates['samples_per_second']['median']:.0f}",
        f"{rates['bytes_per_second']['median'] / 1e6:.0f}",
        f"{1000 * wait:.1f} ms a step, {100 * rates['wait_share']['median']:.0f} % of the time",
    )


def _lock_rows(numbers: Mapping[str, Any]) -> list[tuple[str, str]]:
    share = numbers["released_share"]
    quartiles = f"(quartiles {100 * share['low']:.1f} .. {100 * share['high']:.1f}, n {share['count']})"
    names = ", ".join(f"{owner.__name__.rpartition('.')[2]}.{name}" for owner, name in RELEASING)
    held = 1 - share["median"]
    return [
        ("released", f"{100 * share['median']:.1f} % of CPU time at least {quartiles}: inside {names}"),
        ("held", f"{100 * held:.1f} % at most: everything else counts as the interpreter's"),
        ("so", f"more than {1 / held:.1f} threads cannot be busy at once; beyond that, worker processes help"),
    ]
