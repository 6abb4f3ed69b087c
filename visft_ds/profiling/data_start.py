"""How soon a loader is ready and what it keeps in memory: start-up, seeking, an epoch of labels.

Start-up and seeking need a split of COCO's size but none of its pictures: index and manifest are made up, the shards
are holes in files of the right length. A process of its own opens it, so that nothing is in memory before.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from visft_ds.data.manifest import (
    INDEX_DTYPE,
    Category,
    Manifest,
    ShardFile,
    index_path,
    manifest_bytes,
    manifest_path,
    shard_name,
)
from visft_ds.data.shards import ShardReader
from visft_ds.monitor.console import Section
from visft_ds.profiling.data_source import MeasuredSet, facts_rows, joint_pipeline, our_loader, plan_over
from visft_ds.profiling.timing import Spread

FORMAT, VERSION = "visft_ds data start", 1
SPLIT = "made-up"
_PER_SHARD, _IMAGE_BYTES, _LABEL_BYTES = 1500, 160_000, 5_000
_WORDS = 30_000  #: different ones in COCO's captions, by order of magnitude
_BATCH = 32
_MARKS = 20  #: looks at the memory during an epoch
_MIB = 2**20


@dataclass(frozen=True)
class StartOptions:
    """What is measured. Raises ValueError for what is not possible."""

    samples: int = 120_000
    step: int = 1_000_000
    repeats: int = 5

    def __post_init__(self) -> None:
        if self.samples < _BATCH or self.repeats < 1:
            raise ValueError(f"--samples {self.samples} must be at least {_BATCH}, --repeats {self.repeats} at least 1")


def measure_start(options: StartOptions, data: MeasuredSet | None) -> dict[str, Any]:
    """Start-up and seeking on a made-up split and, with `data`, memory over an epoch of its labels; JSON values."""
    with tempfile.TemporaryDirectory(prefix="visft-profile-") as temporary:
        folder = Path(temporary)
        write_made_up_split(folder, options.samples)
        context = multiprocessing.get_context("spawn")
        starts = []
        for _ in range(options.repeats):
            with context.Pool(1) as pool:  # a new process for each
                starts.append(pool.apply(_start, (str(folder),)))
    first, later = zip(*(_seek(options) for _ in range(options.repeats)), strict=True)
    return {
        "format": FORMAT,
        "version": VERSION,
        "options": asdict(options),
        "load_seconds": asdict(Spread.of([one["seconds"] for one in starts])),
        "resident_bytes": {kind: asdict(Spread.of([one[kind] for one in starts])) for kind in ("RssAnon", "RssFile")},
        "seek_seconds": {"first": asdict(Spread.of(first)), "next": asdict(Spread.of(later))},
        "set": None if data is None else data.facts(),
        "epoch": None if data is None else _epoch_of_labels(data),
    }


def write_made_up_split(folder: Path, samples: int) -> None:
    """Manifest, index and empty shards of a split with as many samples; nothing in it can be decoded."""
    rng = np.random.default_rng(0)
    index = np.zeros(samples, dtype=INDEX_DTYPE)
    index["shard"] = np.arange(samples) // _PER_SHARD
    place = np.arange(samples) % _PER_SHARD * (_IMAGE_BYTES + _LABEL_BYTES)
    index["image_offset"], index["image_size"] = place, _IMAGE_BYTES
    index["label_offset"], index["label_size"] = place + _IMAGE_BYTES, _LABEL_BYTES
    for name in ("image_crc32", "label_crc32"):
        index[name] = rng.integers(0, 2**32, samples)
    index["image_id"] = rng.permutation(samples)
    index["width"], index["height"], index["num_annotations"], index["num_captions"] = 640, 480, 7, 5
    shards = []
    for number in range(int(index["shard"][-1]) + 1):
        count = min(_PER_SHARD, samples - number * _PER_SHARD)
        size = count * (_IMAGE_BYTES + _LABEL_BYTES)
        with (folder / shard_name(SPLIT, number)).open("wb") as file:
            file.truncate(size)  # a hole: takes no room on the disk
        shards.append(ShardFile(shard_name(SPLIT, number), count, size, f"{number:064x}"))
    np.save(index_path(folder, SPLIT), index)
    content = manifest_bytes(
        split=SPLIT,
        categories=[Category(place, place + 1, f"category {place}") for place in range(80)],
        counts={"images": samples},
        shards=shards,
        index=index,
        index_file=index_path(folder, SPLIT).read_bytes(),
        vocabulary={f"word{number}": 1 + number % 7 for number in range(_WORDS)},
        quarantine=(),
        findings=(),
        options={},
        sources={},
    )
    manifest_path(folder, SPLIT).write_bytes(content)


def _start(folder: str) -> dict[str, float]:
    """Seconds until a split can be read, and bytes that this adds; runs in a process of its own."""
    orjson.loads(b"{}")
    before = resident()
    began = time.perf_counter()
    manifest = Manifest.load(folder, SPLIT)
    reader = ShardReader(manifest)
    seconds = time.perf_counter() - began
    after = resident()
    assert len(reader) == len(manifest.index)
    return {"seconds": seconds, **{kind: float(after[kind] - before[kind]) for kind in before}}


def resident() -> dict[str, int]:
    """Bytes of this process in memory: its own ("RssAnon"), and pages of files ("RssFile"), which the system may drop.

    Raises RuntimeError where the system does not say.
    """
    status = Path("/proc/self/status")
    if not status.is_file():
        raise RuntimeError("this system has no /proc: the memory of a process cannot be measured here")
    fields = dict(line.split(":", 1) for line in status.read_text(encoding="ascii").splitlines() if ":" in line)
    return {kind: 1024 * int(fields[kind].split()[0]) for kind in ("RssAnon", "RssFile")}


def _seek(options: StartOptions) -> tuple[float, float]:
    """Seconds until a new plan has the samples of a far step, and of the step behind it."""
    began = time.perf_counter()
    plan = plan_over(options.samples, _BATCH)
    plan.step(options.step)
    first = time.perf_counter() - began
    began = time.perf_counter()
    plan.step(options.step + 1)
    return first, time.perf_counter() - began


def _epoch_of_labels(data: MeasuredSet) -> list[int]:
    """The process's own bytes after each twentieth of an epoch of batches without pixels."""
    batch = min(_BATCH, len(data))
    steps = len(data) // batch
    marks = {round(steps * part / _MARKS) for part in range(1, _MARKS + 1)} - {0}
    found = []
    with ShardReader(data.manifest) as reader:
        loader = our_loader(data, reader, joint_pipeline(data.vocabulary), batch, num_workers=1, role="labels")
        for done, _ in enumerate(loader.steps(0, steps), start=1):
            if done in marks:
                found.append(resident()["RssAnon"])
    return found


# -------------------------------------------------------------------------------------------------------- tables


def make_title(record: Mapping[str, Any]) -> str:
    """One line that says what was measured."""
    return f"start of a loader on {record['options']['samples']:,} samples"


def make_sections(record: Mapping[str, Any]) -> list[Section]:
    """The record as tables."""
    own, file = (record["resident_bytes"][kind] for kind in ("RssAnon", "RssFile"))
    first, later = record["seek_seconds"]["first"], record["seek_seconds"]["next"]
    rows = [
        ("open and check", *_row(record["load_seconds"], 1000, "ms")),
        ("memory, own", *_row(own, 1 / _MIB, "MiB")),
        ("memory, pages of files", *_row(file, 1 / _MIB, "MiB")),
        (f"new plan, step {record['options']['step']:,}", *_row(first, 1000, "ms")),
        ("the step behind it", *_row(later, 1000, "ms")),
    ]
    sections = [Section(f"n {record['options']['repeats']}", rows, ("", "median", "all"))]
    if record["epoch"]:
        marks = [size / _MIB for size in record["epoch"]]
        text = f"{marks[0]:.1f} MiB at the first mark, {max(marks):.1f} at most, {marks[-1]:.1f} at the end"
        sections.append(
            Section(
                "an epoch of labels", [*facts_rows(record["set"]), ("memory, own", f"{text} of {len(marks)} marks")]
            )
        )
    return sections


def _row(spread: Mapping[str, float], scale: float, unit: str) -> tuple[str, str]:
    median, least, most = (scale * spread[key] for key in ("median", "least", "most"))
    return f"{median:.3f} {unit}", f"{least:.3f} .. {most:.3f}"
