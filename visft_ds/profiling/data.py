"""Profile of the data path: CPU time of a sample by part, throughput by workers, and the limit set by the GIL.

The parts are the spans of `visft_ds.data.spans`, measured in the loader that trains. Time outside of them (plans,
random numbers, objects of Python) is the rest, so the parts always add up to the CPU time of the process.

A set to measure on is a folder of finished shards, an ordinary COCO tree (repeated until it is large enough), or
generated images. The last two are packed into a temporary folder.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import simplejpeg
import torch.nn.functional
from isal import isal_zlib

from visft_ds.config import ResolvedConfig
from visft_ds.config.schema import VisftConfig
from visft_ds.config.task_schema import SHARED, SharedImage, Stream
from visft_ds.data.dataset import DataSet, SamplePipeline
from visft_ds.data.loader import StepLoader
from visft_ds.data.plan import Plan, SetPlan, TaskPlan
from visft_ds.data.selection import Selection
from visft_ds.data.shards import ROLES, Manifest, Role, ShardReader, manifest_path
from visft_ds.data.spans import SPANS, Spent, measure_cpu
from visft_ds.data.workers import WorkerKind
from visft_ds.monitor.console import Section
from visft_ds.prepare.datasets import cache_of, settle_classes
from visft_ds.prepare.streams import pipeline_of, streams_of, vocabulary_of
from visft_ds.profiling.harness import CpuClock, circumstances, in_turn, load_row, quartiles, spread
from visft_ds.shards.build import Options, build
from visft_ds.shards.reencode import Reencoding
from visft_ds.tasks.vocabulary import Vocabulary
from visft_ds.toy.annotations import write_toy_coco

FORMAT, VERSION = "visft_ds data", 1
#: Pixels of a side of the plain three-task sample, and the name of its only task.
SIDE, TASK = 224, "joint"
#: Height and width of generated images: COCO's most frequent size. The transforms make of them what they are told.
GENERATED_SIZE = (480, 640)
#: Most shapes of a generated image: 7.3 on average, as many as COCO's have objects.
GENERATED_SHAPES = 18
_SPLIT = "measured"
_SAMPLES_PER_SHARD = 64
#: Generated images that are different; drawing one takes longer than reading it many times.
_DRAWN = 64
#: Between the ids of one repetition of a set and the next; COCO's are below a million.
_REPETITION = 10_000_000
#: Lists of a COCO file, and what of their entries repetitions need.
_FIELDS: dict[str, dict[str, type]] = {"images": {"id": int, "file_name": str}, "annotations": {"image_id": int}}
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
        return [*(("threads", n) for n in self.threads), *(("processes", n) for n in self.processes)]


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
    released: float  #: CPU seconds inside of `RELEASING`, of the calling thread

    def cpu_of(self, part: str) -> float:
        """CPU seconds of a part; of the rest, what is in none."""
        return self.cpu - sum(spent.cpu for spent in self.parts.values()) if part == REST else self.parts[part].cpu


def measure_data(data: MeasuredSet, streams: Sequence[StreamData], options: DataOptions) -> dict[str, Any]:
    """Measure every stream with all kinds and numbers of workers in turn; returns a record of JSON values.

    Raises ValueError where the set is smaller than a batch.
    """
    load = os.getloadavg()
    with ShardReader(data.manifest) as reader:
        measured = {stream.name: _measure_stream(data, reader, stream, options) for stream in streams}
    return {
        "format": FORMAT,
        "version": VERSION,
        **circumstances(load),
        "options": {**asdict(options), "threads": list(options.threads)},
        "set": data.facts(),
        "streams": measured,
    }


def _measure_stream(data: MeasuredSet, reader: ShardReader, stream: StreamData, options: DataOptions) -> dict[str, Any]:
    count = max(1, options.images // stream.batch)
    columns = {"both": ("image_size", "label_size"), "images": ("image_size",), "labels": ("label_size",)}[options.role]
    sizes = np.sum([data.rows[name] for name in columns], axis=0)
    turns = Counter[str]()
    kinds = {f"{number} {kind}": (kind, number) for kind, number in options.workers}
    alone = "alone, watched"

    def measure(name: str) -> _Pass:
        """Run the next `count` steps and measure their cost."""
        start, turns[name] = turns[name] * count, turns[name] + 1
        kind, number = kinds.get(name, ("threads", 0))
        measure_cpu()
        how: dict[str, Any] = {"workers": kind, "num_workers": number, "role": options.role, "name": stream.name}
        loader = our_loader(data, reader, stream.pipeline, stream.batch, **how)
        inside: list[float] = []
        with _watched(inside) if name == alone else nullcontext():
            before, clock, wall = loader.spent(), CpuClock.start(), time.perf_counter()
            samples = size = 0
            wait = 0.0
            for step_plan, _ in loader.steps(start, start + count):
                wait += loader.wait_seconds
                samples += len(step_plan.indices)
                size += int(sizes[step_plan.indices].sum())
                if options.step_ms:
                    time.sleep(options.step_ms / 1000)
            wall, cpu = time.perf_counter() - wall, clock.seconds()
        after = loader.spent()
        parts = {part: after[part] - before[part] for part in SPANS}
        return _Pass(samples, count, size, cpu, wall, wait, parts, sum(inside))

    found = in_turn([*kinds, alone], measure, options.repeats)
    watched, first = found.pop(alone), next(iter(kinds))
    seen = [name for name in SPANS if found[first][0].parts[name].count]
    return {
        "batch": stream.batch,
        "steps": count,
        "parts_by": first,
        "parts": {
            part: {
                "cpu_seconds": spread(each.cpu_of(part) / each.samples for each in found[first]),
                "share": spread(each.cpu_of(part) / each.cpu for each in found[first]),
            }
            for part in [*seen, REST]
        },
        "by_workers": {
            name: {
                "cpu_seconds_per_sample": spread(each.cpu / each.samples for each in passes),
                "samples_per_cpu_second": spread(each.samples / each.cpu for each in passes),
                "samples_per_second": spread(each.samples / each.wall for each in passes),
                "wait_seconds_per_step": spread(each.wait / each.steps for each in passes),
                "wait_share": spread(each.wait / each.wall for each in passes),
                "bytes_per_second": spread(each.bytes / each.wall for each in passes),
                "bytes_per_sample": sum(each.bytes for each in passes) / sum(each.samples for each in passes),
            }
            for name, passes in found.items()
        },
        "released_share": spread(each.released / each.cpu for each in watched),
    }


@contextmanager
def _watched(inside: list[float]) -> Iterator[None]:
    """Collect the CPU seconds of every call in `RELEASING` inside this context, of the calling thread only."""

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            began = time.thread_time()
            result = function(*arguments, **named)
            inside.append(time.thread_time() - began)
            return result

        return call

    with ExitStack() as stack:
        for owner, name in RELEASING:
            function = getattr(owner, name)
            setattr(owner, name, timed(function))
            stack.callback(setattr, owner, name, function)
        yield


# ---------------------------------------------------------------------------------------------------------- sets


@dataclass(frozen=True)
class MeasuredSet:
    """Shards to measure on: the first of a split that together have enough samples."""

    name: str  #: for tables
    manifest: Manifest
    shards: int

    @classmethod
    def of(cls, name: str, manifest: Manifest, images: int) -> MeasuredSet:
        """As many whole shards as it takes to have `images` samples; all of them where there are fewer."""
        sums = np.cumsum([shard.count for shard in manifest.shards])
        return cls(name, manifest, min(int(np.searchsorted(sums, images)) + 1, len(sums)))

    @property
    def urls(self) -> list[str]:
        """The shards as webdataset takes them."""
        return [f"{self.manifest.root}/{shard.name}" for shard in self.manifest.shards[: self.shards]]

    def __len__(self) -> int:
        """Samples in these shards: the first ones of the index."""
        return sum(shard.count for shard in self.manifest.shards[: self.shards])

    @property
    def rows(self) -> npt.NDArray[Any]:
        """Their rows of the index."""
        return self.manifest.index[: len(self)]

    def facts(self) -> dict[str, Any]:
        """Name and size of the set, and means over its samples that determine their work, for records and tables."""
        rows = self.rows
        return {
            "name": self.name,
            "samples": len(self),
            "shards": self.shards,
            "image_bytes": float(rows["image_size"].mean()),
            "label_bytes": float(rows["label_size"].mean()),
            "pixels": float((rows["width"].astype(np.int64) * rows["height"]).mean()),
            "objects": float(rows["num_annotations"].mean()),
            "captions": float(rows["num_captions"].mean()),
        }

    @property
    def vocabulary(self) -> Vocabulary:
        """Every word of the captions: small sets have few."""
        return Vocabulary.from_counts(self.manifest.vocabulary, min_count=1)


def facts_rows(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """`MeasuredSet.facts` for a person."""
    return [
        ("set", f"{facts['name']}: {facts['samples']:,} samples in {facts['shards']} shards"),
        (
            "a sample",
            f"{facts['image_bytes'] / 1000:.0f} kB, {facts['pixels'] / 1e6:.2f} million pixels, "
            f"{facts['objects']:.1f} objects, {facts['captions']:.1f} captions, labels of "
            f"{facts['label_bytes'] / 1000:.1f} kB",
        ),
    ]


@contextmanager
def open_set(folder: Path | None, split: str, images: int, reencode: Reencoding | None = None) -> Iterator[MeasuredSet]:
    """A set by its folder: shards, a COCO tree, or (None) generated images.

    Args:
        folder: holds `SPLIT.manifest.json`, or `annotations/` beside the folders of images.
        split: name of the shards; "train" also finds `train2017` of a COCO tree.
        images: number of samples wanted. A tree or generated images are repeated until there are as many; of
            finished shards, the first ones are taken.
        reencode: re-encoding of the images of a tree, or of generated ones; None for finished shards.

    Raises:
        ValueError: the folder holds neither; what is found in it is damaged; finished shards and `reencode`.
    """
    if folder is not None and manifest_path(folder, split).is_file():
        if reencode is not None:
            raise ValueError(f"--reencode: {folder} holds finished shards; give a COCO tree, or leave it out")
        yield MeasuredSet.of(f"{folder.name}/{split}", Manifest.load(folder, split), images)
        return
    with tempfile.TemporaryDirectory(prefix="visft-profile-") as temporary:
        work = Path(temporary)
        if folder is None:
            height, width = GENERATED_SIZE
            drawn = min(images, _DRAWN)
            write_toy_coco(work / "coco", train=drawn, val=0, height=height, width=width, max_shapes=GENERATED_SHAPES)
            tree, part, name = work / "coco", "train2017", f"generated {width} x {height}"
        else:
            tree, part, name = folder, _part(folder, split), folder.name
        if reencode is not None:
            side = "" if reencode.short_side is None else f", short side {reencode.short_side}"
            name += f", stored as JPEG of quality {reencode.quality}{side}"
        yield MeasuredSet.of(name, _pack(tree, part, work, images, reencode), images)


def _part(folder: Path, split: str) -> str:
    for part in (split, f"{split}2017"):
        if (folder / "annotations" / f"instances_{part}.json").is_file() and (folder / part).is_dir():
            return part
    raise ValueError(
        f"--data {folder}: neither shards ({split}.manifest.json) nor a COCO tree "
        f"(annotations/instances_{split}2017.json beside {split}2017/); give the folder of one, or leave --data out "
        "and give --synthetic"
    )


def _pack(tree: Path, part: str, work: Path, images: int, reencode: Reencoding | None) -> Manifest:
    """Shards of a COCO tree below `work`, with every image as often as it takes to have `images` samples.

    Each repetition of an image or annotation has an id of its own.
    """
    instances, captions = (_read(tree / "annotations" / f"{kind}_{part}.json") for kind in ("instances", "captions"))
    if not instances["images"]:
        raise ValueError(f"--data {tree}: instances_{part}.json has no images; give a tree with at least one")
    turns = range(max(1, -(-images // len(instances["images"]))))

    def file_name(image: Mapping[str, Any], turn: int) -> str:
        return f"{image['id'] + _REPETITION * turn:012d}.jpg"

    pictures = work / "pictures"
    pictures.mkdir()
    for image in instances["images"]:
        for turn in turns:
            (pictures / file_name(image, turn)).symlink_to((tree / part / image["file_name"]).resolve())
    for kind, content in (("instances", instances), ("captions", captions)):
        repeated = {
            "images": [
                {**image, "id": image["id"] + _REPETITION * turn, "file_name": file_name(image, turn)}
                for turn in turns
                for image in content["images"]
            ],
            "annotations": [
                {
                    **annotation,
                    "id": turn * len(content["annotations"]) + place,
                    "image_id": annotation["image_id"] + _REPETITION * turn,
                }
                for turn in turns
                for place, annotation in enumerate(content["annotations"], start=1)
            ],
        }
        (work / f"{kind}.json").write_bytes(orjson.dumps({**content, **repeated}))
    build(
        Options(
            images=pictures,
            instances=work / "instances.json",
            captions=work / "captions.json",
            out=work / "shards",
            split=_SPLIT,
            max_count=_SAMPLES_PER_SHARD,
            reencode=reencode,
        )
    )
    return Manifest.load(work / "shards", _SPLIT)


def _read(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    for name, fields in _FIELDS.items():
        entries = content.get(name) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(_has(entry, fields) for entry in entries):
            raise ValueError(f"{path} is no COCO file: '{name}' must be a list of objects with {', '.join(fields)}")
    return content


def _has(entry: Any, fields: Mapping[str, type]) -> bool:
    return isinstance(entry, dict) and all(isinstance(entry.get(name), kind) for name, kind in fields.items())


def joint_pipeline(vocabulary: Vocabulary) -> SamplePipeline:
    """The plain three-task sample: boxes, masks of 56 x 56 cells and one caption on a square of 224 pixels."""
    tasks = ("detection", "segmentation", "captioning")
    image = SharedImage(fixed_size=SIDE).model_dump()
    return pipeline_of(Stream(SHARED, tasks, 1.0, 1, 1, image), vocabulary, train=True)


def our_loader(
    data: MeasuredSet,
    reader: ShardReader,
    pipeline: SamplePipeline,
    batch: int,
    *,
    workers: WorkerKind = "threads",
    num_workers: int,
    role: Role = "both",
    name: str = TASK,
) -> StepLoader:
    """The loader of this project over a set, in global shuffled order; one process has the whole batch."""
    return StepLoader(
        {_SPLIT: DataSet(reader)},
        Plan({name: TaskPlan({_SPLIT: SetPlan(Selection.all(len(data)))}, batch)}, 0),
        {name: {_SPLIT: pipeline}},
        role=role,
        workers=workers,
        num_workers=num_workers,
    )


@contextmanager
def plain(folder: Path | None, split: str, images: int, batch: int) -> Iterator[tuple[MeasuredSet, list[StreamData]]]:
    """A set, and the plain sample of three tasks as its only stream."""
    if batch < 1:
        raise ValueError(f"--batch {batch} must be at least 1")
    with open_set(folder, split, max(images, batch)) as data:
        yield data, [StreamData(TASK, joint_pipeline(data.vocabulary), min(batch, len(data)))]


def every_word(settings: VisftConfig) -> VisftConfig:
    """Settings whose vocabulary has every word: generated captions are few."""
    words = settings.tasks.with_words()
    if words is None or words[1].vocabulary.file is not None:
        return settings
    name, task = words
    task = task.model_copy(update={"vocabulary": task.vocabulary.model_copy(update={"min_count": 1})})
    return settings.model_copy(update={"tasks": settings.tasks.model_copy(update={name: task})})


@contextmanager
def configured(
    config: ResolvedConfig, images: int, *, split: str | None, synthetic: bool
) -> Iterator[tuple[MeasuredSet, list[StreamData]]]:
    """The set and the streams of a configuration, with its transforms and batches."""
    settings = every_word(config.visft) if synthetic else config.visft
    wanted = max([images, *(stream.batch_size for stream in settings.streams().values())])
    with ExitStack() as stack:
        if synthetic:
            data = stack.enter_context(open_set(None, "train", wanted))
        else:
            where, split = settings.data.root, split or settings.data.train
            manifest = Manifest.load(where, split, cache=cache_of(settings.data))
            data = MeasuredSet.of(f"{where}/{split}", manifest, wanted)
        words = vocabulary_of(settings, data.manifest)
        streams = streams_of(settle_classes(config, data.manifest).visft, data.manifest)
        yield (
            data,
            [
                StreamData(stream.name, pipeline_of(stream, words, train=True), min(stream.batch_size, len(data)))
                for stream in streams.values()
            ],
        )


# -------------------------------------------------------------------------------------------------------- tables


def tables(record: Mapping[str, Any]) -> tuple[str, list[Section]]:
    """(title, tables) of a record: what was read; of each stream the parts, the workers and the interpreter lock."""
    options = record["options"]
    role = {"both": "", "images": ", pictures only", "labels": ", labels only"}[options["role"]]
    title = f"data path: {', '.join(record['streams'])} on {record['set']['name']}{role}"
    facts = [
        *facts_rows(record["set"]),
        load_row(record, f"before, {record['cores']} cores"),
        ("repeats", f"{options['repeats']} after 1 to warm up, the kinds of workers in turn"),
        ("consumer", f"busy for {options['step_ms']:g} ms with each step" if options["step_ms"] else "only waits"),
    ]
    sections = [Section("on", facts)]
    for name, numbers in record["streams"].items():
        head = f"{name}, {numbers['steps']} steps of {numbers['batch']}"
        by_workers, by = numbers["by_workers"], numbers["parts_by"]
        total = {"cpu_seconds": by_workers[by]["cpu_seconds_per_sample"], "share": {"median": 1.0}}
        rows: list[tuple[str, ...]] = [
            (
                part,
                f"{1e6 * found['cpu_seconds']['median']:9.1f}",
                quartiles(found["cpu_seconds"], 0, 1e6),
                f"{100 * found['share']['median']:6.2f} %",
            )
            for part, found in (*numbers["parts"].items(), ("whole", total))
        ]
        columns: tuple[str, ...] = ("", "CPU us a sample", "quartiles", "share of CPU")
        sections.append(Section(f"{head}: where the time goes, {by}", rows, columns))
        rows = [
            (
                workers,
                f"{1000 * rates['cpu_seconds_per_sample']['median']:.3f}",
                quartiles(rates["cpu_seconds_per_sample"], 3, 1000),
                f"{rates['samples_per_cpu_second']['median']:.0f}",
                f"{rates['samples_per_second']['median']:.0f}",
                f"{rates['bytes_per_second']['median'] / 1e6:.0f}",
                f"{1000 * rates['wait_seconds_per_step']['median']:.1f} ms a step, "
                f"{100 * rates['wait_share']['median']:.0f} % of the time",
            )
            for workers, rates in by_workers.items()
        ]
        columns = ("workers", "CPU ms", "quartiles", "samples per CPU-second", "samples a second", "MB/s", "wait")
        sections.append(Section(f"{head}: workers", rows, columns))
        share = numbers["released_share"]
        calls = ", ".join(f"{owner.__name__.rpartition('.')[2]}.{call}" for owner, call in RELEASING)
        least = f"{100 * share['median']:.1f} % of CPU time at least"
        held = 1 - share["median"]
        rows = [
            ("released", f"{least} (quartiles {quartiles(share, 1, 100)}, n {share['count']}): inside {calls}"),
            ("held", f"{100 * held:.1f} % at most: everything else counts as the interpreter's"),
            ("so", f"more than {1 / held:.1f} threads cannot be busy at once; beyond that, worker processes help"),
        ]
        sections.append(Section(f"{head}: the interpreter lock", rows))
    return title, sections
