"""From a plan to batches, with threads that read ahead.

Threads, not processes: decoding, resizing, hashing and reading all release the interpreter lock, and batches need not
be copied between processes. Threads hold no state; what a step contains is the plan's business alone.

Shape letters: B images.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import orjson
import torch

from visft_ds.data.decode import decode_image
from visft_ds.data.plan import Plan, StepPlan, generator
from visft_ds.data.samples import Batch, RawSample, Sample
from visft_ds.data.shards import Role, ShardReader
from visft_ds.data.spans import span


@dataclass(frozen=True)
class Pipeline:
    """What turns the raw samples of a task into a batch."""

    transform: Callable[[RawSample, np.random.Generator], Sample]
    collate: Callable[[list[Sample]], Batch]


def read_raw(reader: ShardReader, index: int, role: Role = "both") -> RawSample:
    """Read and decode one sample; `role` "images" leaves annotations and captions empty, "labels" the image None.

    Raises:
        ValueError: damaged bytes; names shard and key.
    """
    row = reader.row(index)
    image_file, label_file = reader.read(index, role)
    image = None
    if image_file is not None:
        try:
            with span("decode"):
                image = decode_image(image_file)
        except ValueError as error:
            raise ValueError(f"{reader.describe(index)}: {error}") from error
        if image.shape[:2] != (row["height"], row["width"]):
            raise ValueError(
                f"{reader.describe(index)}: the image is {image.shape[1]} x {image.shape[0]} pixels, "
                f"not {row['width']} x {row['height']} as in the index"
            )
    with span("labels"):
        label: Mapping[str, Any] = {} if label_file is None else orjson.loads(label_file)
    return RawSample(
        index=index,
        image_id=row["image_id"],
        size=(row["height"], row["width"]),
        image=image,
        annotations=label.get("annotations", ()),
        captions=label.get("captions", ()),
    )


def coco_dataset(reader: ShardReader, indices: Sequence[int] | None = None) -> dict[str, Any]:
    """The stored annotations (crowds included) as an ordinary COCO dictionary, for evaluators."""
    images, annotations = [], []
    for index in range(len(reader)) if indices is None else indices:
        label = orjson.loads(reader.read(index, "labels")[1] or b"")
        images.append({name: label[name] for name in ("file_name", "width", "height")} | {"id": label["image_id"]})
        annotations += [{**annotation, "image_id": label["image_id"]} for annotation in label["annotations"]]
    categories = [{"id": category.coco_id, "name": category.name} for category in reader.manifest.categories]
    return {"images": images, "annotations": annotations, "categories": categories}


def caption_dataset(reader: ShardReader, indices: Sequence[int] | None = None) -> dict[str, Any]:
    """The stored captions in the form of COCO's captions_*.json, for evaluators."""
    annotations = []
    for index in range(len(reader)) if indices is None else indices:
        label = orjson.loads(reader.read(index, "labels")[1] or b"")
        annotations += [{"image_id": label["image_id"], "caption": caption} for caption in label["captions"]]
    return {"annotations": annotations}


class StepLoader:
    """The batches of one data-parallel rank.

    Args:
        reader: the split.
        plan: the order; the loader never draws anything itself.
        pipelines: task -> Pipeline, for every task of the plan.
        dp_rank, dp_size, accumulation: this rank's part of each global batch.
        role: what to read. "images" gives batches without targets, "labels" batches without pixels; both have the
            same samples, sizes and keys in the same order.
        threads: how many read ahead; 0 works in the caller's thread, one step at a time.
        prefetch_steps: how many steps may be ready beyond the one in use.

    `wait_seconds` is the time the last step made its consumer wait.

    Raises:
        ValueError: a task without a pipeline, or a global batch that cannot be split as asked.
    """

    def __init__(
        self,
        reader: ShardReader,
        plan: Plan,
        pipelines: Mapping[str, Pipeline],
        *,
        dp_rank: int = 0,
        dp_size: int = 1,
        accumulation: int = 1,
        role: Role = "both",
        threads: int = 2,
        prefetch_steps: int = 2,
    ) -> None:
        missing = sorted(set(plan.tasks) - set(pipelines))
        if missing:
            raise ValueError(f"no pipeline for {', '.join(missing)}; the plan has {', '.join(plan.tasks)}")
        if threads < 0 or prefetch_steps < 0:
            raise ValueError(f"threads={threads} and prefetch_steps={prefetch_steps} must not be negative")
        plan.check_split(dp_size, accumulation)
        self._reader, self._plan, self._pipelines = reader, plan, pipelines
        self._dp_rank, self._dp_size, self._accumulation = dp_rank, dp_size, accumulation
        self._role: Role = role
        self._threads, self._prefetch = threads, prefetch_steps if threads else 0
        self.wait_seconds = 0.0

    def steps(self, start: int, stop: int | None = None) -> Iterator[tuple[StepPlan, list[Batch]]]:
        """Steps start, start + 1, ... (to `stop`, exclusive; endless without) with this rank's micro-batches.

        The StepPlan is that of the whole global batch. An error in a thread appears here, at its step. Leaving the loop
        in any way, or closing the iterator, ends the threads.
        """
        with _Workers(self._reader, self._role, self._threads) as workers:
            waiting: deque[tuple[StepPlan, list[_Job]]] = deque()
            planned = start
            step = start
            while stop is None or step < stop:
                while len(waiting) <= self._prefetch and (stop is None or planned < stop):
                    waiting.append(self._submit(workers, planned))
                    planned += 1
                whole, jobs = waiting.popleft()
                began = time.perf_counter()
                batches = [job.result() for job in jobs]
                self.wait_seconds = time.perf_counter() - began
                yield whole, batches
                step += 1

    def _submit(self, workers: _Workers, step: int) -> tuple[StepPlan, list[_Job]]:
        whole = self._plan.step(step)
        parts = self._plan.split(whole, self._dp_rank, self._dp_size, self._accumulation)
        pipeline = self._pipelines[whole.task]
        return whole, [_Job(workers, pipeline, part.indices.tolist(), part.keys.tolist()) for part in parts]


def evaluation_batches(
    reader: ShardReader,
    pipeline: Pipeline,
    batch_size: int,
    rank: int,
    world_size: int,
    limit: int | None = None,
    *,
    threads: int = 2,
    role: Role = "both",
) -> Iterator[Batch]:
    """Every image (of the first `limit`) exactly once over all ranks, with the same number of batches on each.

    Where the images do not divide evenly, ranks repeat one with `Batch.real` False: collective operations stay in step
    and no result is counted twice.

    Raises:
        ValueError: a batch size, rank or limit out of range.
    """
    if batch_size < 1 or not 0 <= rank < world_size or (limit is not None and limit < 1):
        raise ValueError(f"batch_size={batch_size}, rank={rank} of {world_size}, limit={limit} is not allowed")
    count = len(reader) if limit is None else min(limit, len(reader))
    rounds = -(-count // world_size)
    indices = [rank + world_size * turn for turn in range(rounds)]
    with _Workers(reader, role, threads) as workers:
        waiting: deque[tuple[_Job, list[bool]]] = deque()
        for first in range(0, rounds, batch_size):
            part = indices[first : first + batch_size]
            chosen = [min(index, count - 1) for index in part]
            waiting.append((_Job(workers, pipeline, chosen, [0] * len(part)), [index < count for index in part]))
            if len(waiting) > 2:
                yield _finish(*waiting.popleft())
        while waiting:
            yield _finish(*waiting.popleft())


def _finish(job: _Job, real: list[bool]) -> Batch:
    return replace(job.result(), real=torch.tensor(real))


class _Job:
    """One batch in the making. Whoever finishes its last sample also collates."""

    def __init__(self, workers: _Workers, pipeline: Pipeline, indices: list[int], keys: list[int]) -> None:
        self._workers, self._pipeline = workers, pipeline
        self._indices, self._keys = indices, keys
        self._samples: list[Sample | None] = [None] * len(indices)
        self._left = len(indices)
        self._lock = threading.Lock()
        pool = workers.pool
        self._futures = [pool.submit(self._make, place) for place in range(len(indices))] if pool else []

    def result(self) -> Batch:
        """Wait for the batch (or make it here, where there are no threads); raises what went wrong with a sample."""
        if self._workers.pool is None:
            made = [self._make(place) for place in range(len(self._indices))]
        else:
            made = [future.result() for future in self._futures]
        return next(batch for batch in made if batch is not None)

    def _make(self, place: int) -> Batch | None:
        """Make one sample; the batch too if it was the last."""
        raw = read_raw(self._workers.reader, self._indices[place], self._workers.role)
        key = self._keys[place]
        sample = self._pipeline.transform(raw, generator(key))
        # Without labels, empty targets would claim that there is nothing in the picture.
        targets = {} if self._workers.role == "images" else sample.targets
        self._samples[place] = replace(sample, random_key=key, targets=targets)
        with self._lock:
            self._left -= 1
            if self._left:
                return None
        with span("collate"):
            return self._pipeline.collate([sample for sample in self._samples if sample is not None])


class _Workers:
    """The threads of one loop, which make samples in the order in which their jobs were started."""

    def __init__(self, reader: ShardReader, role: Role, threads: int) -> None:
        self.reader = reader
        self.role: Role = role
        self.pool = ThreadPoolExecutor(threads, "data") if threads else None

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *_: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(wait=True, cancel_futures=True)
