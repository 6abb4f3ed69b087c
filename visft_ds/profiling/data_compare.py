"""This project's loader beside plain webdataset on the same shards: rounds in turn, CPU time of all processes.

CPU time is that of this process and of all its worker processes; a pass counts from before its workers start until they
have ended. Every ratio is formed inside one round, whose passes follow each other; the order of the
passes moves on by one with every round, lest one of them always have the same neighbours.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from visft_ds.data.loader import StepLoader
from visft_ds.data.shards import ShardReader
from visft_ds.monitor.console import Section
from visft_ds.profiling import data_baselines as plain
from visft_ds.profiling.data_source import MeasuredSet, facts_rows, joint_pipeline, open_set, our_loader
from visft_ds.profiling.timing import CpuClock, Spread
from visft_ds.shards.reencode import Reencoding

FORMAT, VERSION = "visft_ds data comparison", 1
#: Passes of one kind; each returns its number of samples.
Passes = Mapping[str, Callable[[], int]]
_WORKERS = (0, 1, 2)
#: Times that a pass of plain reading goes through the set: once takes milliseconds only.
_TURNS = 8
SAMPLE, LABELS_READ, LABELS_PARSED, LABELS, RAW = (
    "three-task sample at 224 pixels",
    "labels, bytes",
    "labels, parsed",
    "labels, batches of targets",
    "bytes of samples, nothing decoded",
)


class Rivals(NamedTuple):
    """Two passes of a group whose CPU times are compared."""

    group: str
    theirs: str
    ours: str


PAIRS = (
    Rivals(SAMPLE, "naive webdataset, 0 workers", "ours, 0 threads"),
    Rivals(SAMPLE, "naive webdataset, 2 workers", "ours, 2 threads"),
    Rivals(SAMPLE, "tuned webdataset, 0 workers", "ours, 0 threads"),
    Rivals(SAMPLE, "tuned webdataset, 1 workers", "ours, 1 threads"),
    Rivals(SAMPLE, "tuned webdataset, 2 workers", "ours, 2 threads"),
    Rivals(SAMPLE, "tuned webdataset, 2 workers", "ours, 2 processes"),
    Rivals(LABELS_READ, "webdataset, json files selected", "ours, shuffled, crc"),
)


@dataclass(frozen=True)
class CompareOptions:
    """Options of the comparison. Raises ValueError for values out of range."""

    folder: Path | None  #: of shards or a COCO tree; None: generated images
    split: str = "train"
    images: int = 512  #: of a pass, at least
    batch: int = 32
    rounds: int = 5
    reencode: str | None = None  #: re-encoding of images, as visft shards takes it

    def __post_init__(self) -> None:
        for name in ("images", "batch", "rounds"):
            if getattr(self, name) < 1:
                flag = "repeats" if name == "rounds" else name
                raise ValueError(f"--{flag} {getattr(self, name)} must be at least 1")
        if self.batch > self.images:
            raise ValueError(f"--batch {self.batch} is more than the --images {self.images} of a pass")


def compare(options: CompareOptions) -> dict[str, Any]:
    """Measure every group of passes on one set; returns a record of JSON values.

    Raises ValueError where the shards are fewer than the worker processes.
    """
    stored = None if options.reencode is None else Reencoding.parse(options.reencode)
    with open_set(options.folder, options.split, options.images, stored) as data, ShardReader(data.manifest) as reader:
        if data.shards < max(_WORKERS):
            raise ValueError(
                f"{data.name} has {data.shards} shard: webdataset needs one for each of {max(_WORKERS)} worker "
                "processes. Make smaller shards (--max-count), or give the COCO tree itself"
            )
        groups = passes(data, reader, options.batch)
        with plain.quiet():
            measured = {name: _measure(group, options.rounds) for name, group in groups.items()}
        facts = data.facts()
    return {
        "format": FORMAT,
        "version": VERSION,
        "webdataset": plain.VERSION,
        "options": {**asdict(options), "folder": None if options.folder is None else str(options.folder)},
        "set": facts,
        "groups": {name: _summary(rounds) for name, rounds in measured.items()},
        "ratios": [_ratio(pair, measured[pair.group]) for pair in PAIRS],
    }


# -------------------------------------------------------------------------------------------------------- passes


def passes(data: MeasuredSet, reader: ShardReader, batch: int) -> dict[str, Passes]:
    """The passes that are compared, by group and name."""
    pipeline, urls, whole = joint_pipeline(data.vocabulary), data.urls, len(data)
    naive = partial(plain.naive, urls, data.vocabulary, batch)
    tuned = partial(plain.tuned, urls, pipeline, batch, buffer=whole)
    ours = partial(our_loader, data, reader, pipeline, batch)
    selected = partial(plain.label_batches, urls, pipeline, batch, buffer=whole)
    steps = whole // batch
    sample: dict[str, Callable[[], int]] = {}
    for workers in (0, 2):
        sample[f"naive webdataset, {workers} workers"] = partial(_naive, partial(naive, workers=workers))
    for workers in _WORKERS:
        sample[f"tuned webdataset, {workers} workers"] = partial(_tuned, partial(tuned, workers=workers))
        sample[f"ours, {workers} threads"] = partial(_ours, ours(num_workers=workers), steps)
    for number in _WORKERS[1:]:
        processes = ours(workers="processes", num_workers=number)
        sample[f"ours, {number} processes"] = partial(_ours, processes, steps)
    return {
        SAMPLE: sample,
        LABELS: {
            "webdataset, json files selected": partial(_tuned, selected),
            "ours, 0 threads": partial(_ours, ours(num_workers=0, role="labels"), steps),
        },
        LABELS_PARSED: {
            "webdataset, json files selected": partial(_streamed, partial(plain.labels, urls, parse=True)),
            "ours, shuffled, crc": partial(_read_labels, reader, whole, batch, parse=True),
        },
        LABELS_READ: {
            "webdataset, json files selected": partial(_streamed, partial(plain.labels, urls, parse=False)),
            "ours, shuffled, crc": partial(_read_labels, reader, whole, batch, parse=False),
        },
        RAW: {
            "webdataset, shards in order": partial(_streamed, partial(plain.raw, urls, 0)),
            "webdataset, shuffled": partial(_streamed, partial(plain.raw, urls, whole)),
            "index and pread, shuffled, no crc": partial(_pread, data),
            "ours, shuffled, crc": partial(_read, reader, whole),
        },
    }


def _ours(loader: StepLoader, steps: int) -> int:
    return sum(len(part.indices) for _, batches in loader.steps(0, steps) for part in batches)


def _read(reader: ShardReader, count: int) -> int:
    order = plain.shuffled(count)
    for _ in range(_TURNS):
        for index in order:
            reader.read(index)
    return _TURNS * count


def _read_labels(reader: ShardReader, count: int, batch: int, *, parse: bool) -> int:
    order = plain.shuffled(count)
    for _ in range(_TURNS):
        for first in range(0, count, batch):
            for data in reader.read_labels(order[first : first + batch]):
                if parse:
                    orjson.loads(data)
    return _TURNS * count


def _pread(data: MeasuredSet) -> int:
    return sum(plain.pread(data) for _ in range(_TURNS))


def _naive(start: Callable[[], Iterator[Any]]) -> int:
    return sum(len(images) for images, _ in start())


def _tuned(start: Callable[[], Iterator[Any]]) -> int:
    return sum(len(batch.indices) for batch in start())


def _streamed(start: Callable[[], Iterator[Any]]) -> int:
    return sum(1 for _ in range(_TURNS) for _ in start())


# ----------------------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Cost:
    """Cost of a pass."""

    samples: int
    cpu: float  #: seconds of this process and its workers
    wall: float  #: seconds


def measure_pass(run: Callable[[], int]) -> Cost:
    """Run a pass and measure its cost; `run` returns its number of samples."""
    clock, wall = CpuClock.start(), time.perf_counter()
    samples = run()
    wall = time.perf_counter() - wall
    return Cost(samples, clock.seconds(), wall)


def _measure(group: Passes, rounds: int) -> list[dict[str, Cost]]:
    """Costs by name of every round; one round before these brings files and code into memory."""
    names = list(group)
    found = []
    for turn in range(rounds + 1):
        first = turn % len(names)
        costs = {name: measure_pass(group[name]) for name in names[first:] + names[:first]}
        if turn:
            found.append(costs)
    return found


def _summary(rounds: Sequence[Mapping[str, Cost]]) -> dict[str, Any]:
    return {
        name: {
            "cpu_seconds_per_sample": asdict(Spread.of([costs[name].cpu / costs[name].samples for costs in rounds])),
            "wall_samples_per_second": asdict(Spread.of([costs[name].samples / costs[name].wall for costs in rounds])),
            "samples": rounds[0][name].samples,
        }
        for name in rounds[0]
    }


def _ratio(pair: Rivals, rounds: Sequence[Mapping[str, Cost]]) -> dict[str, Any]:
    ratios = [
        (costs[pair.theirs].cpu / costs[pair.theirs].samples) / (costs[pair.ours].cpu / costs[pair.ours].samples)
        for costs in rounds
    ]
    return {**pair._asdict(), "ratio": asdict(Spread.of(ratios))}


# -------------------------------------------------------------------------------------------------------- tables


def make_title(record: Mapping[str, Any]) -> str:
    """Title of the tables: webdataset's version and the data set."""
    return f"the loader against plain webdataset {record['webdataset']} on {record['set']['name']}"


def make_sections(record: Mapping[str, Any]) -> list[Section]:
    """The record as tables: what was read, every group, the ratios."""
    load = ", ".join(f"{value:.2f}" for value in record["load"])
    options, facts = record["options"], record["set"]
    rows = [
        *facts_rows(facts),
        ("passes", f"{options['rounds']} rounds in turn after 1 to warm up, batches of {options['batch']}"),
        ("load", f"{load} before, {record['cores']} cores"),
        ("CPU time", "of this process and its workers, their start included; wall-clock rates depend on the load"),
    ]
    sections = [Section("on", rows)]
    for name, group in record["groups"].items():
        columns = ("", "CPU us a sample", "quartiles", "samples per CPU-second", "samples a second")
        sections.append(Section(name, [_row(one, numbers) for one, numbers in group.items()], columns))
    ratios = [
        (
            f"{pair['theirs']} / {pair['ours']}",
            f"{pair['ratio']['median']:.2f}",
            f"{pair['ratio']['low']:.2f} .. {pair['ratio']['high']:.2f}",
        )
        for pair in record["ratios"]
    ]
    title = f"ratios, pairwise, n {options['rounds']}"
    return [*sections, Section(title, ratios, ("CPU time a sample", "ratio", "quartiles"))]


def _row(name: str, numbers: Mapping[str, Any]) -> tuple[str, ...]:
    cpu, wall = numbers["cpu_seconds_per_sample"], numbers["wall_samples_per_second"]
    return (
        name,
        f"{1e6 * cpu['median']:10.1f}",
        f"{1e6 * cpu['low']:.1f} .. {1e6 * cpu['high']:.1f}",
        f"{1 / cpu['median']:10.0f}",
        f"{wall['median']:10.0f}",
    )
