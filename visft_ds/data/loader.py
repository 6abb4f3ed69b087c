"""Micro-batches of a rank, made ahead of their use by torch's DataLoader: the plan says which, workers hold
no state.

Shape letters: B images.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset

from visft_ds.data.dataset import SamplePipeline, read_raw
from visft_ds.data.features import FeatureCache, View
from visft_ds.data.plan import Plan, StepPlan
from visft_ds.data.samples import Batch
from visft_ds.data.shards import Role, ShardReader
from visft_ds.data.workers import fork_server, start_worker
from visft_ds.errors import RankError
from visft_ds.randomness import generator

#: Steps for which remote shards are fetched ahead.
_FETCHED_STEPS = 32


@dataclass(frozen=True)
class _BatchMaker(Dataset[Batch | Exception]):
    """Batches by the plan of each, as workers make them. Samples whose features are kept come without
    pixels.
    """

    sets: Mapping[str, ShardReader]
    pipelines: Mapping[str, Mapping[str, SamplePipeline]]  #: task -> data set -> what makes its batches
    role: Role = "both"
    features: FeatureCache | None = None

    def __getitem__(self, part: StepPlan) -> Batch | Exception:
        reader, pipeline = self.sets[part.dataset], self.pipelines[part.task][part.dataset]
        samples = []
        try:
            for index, key in zip(part.indices.tolist(), part.keys.tolist(), strict=True):
                view = None if self.features is None else self.features.get(key, index)
                raw = read_raw(reader, index, self.role if view is None else "labels")
                sample = pipeline.transform(raw, generator(key))
                if self.features is not None and view is None:
                    assert sample.image is not None
                    view = View((sample.image.shape[1], sample.image.shape[2]))
                # Without labels, empty targets would claim that there is nothing in the image.
                targets = {} if self.role == "images" else sample.targets
                samples.append(replace(sample, random_key=key, targets=targets, view=view))
            return pipeline.collate(samples)
        except (ValueError, OSError, RuntimeError) as error:
            return error  # raised by the consumer: torch would wrap it into another message


@dataclass(eq=False)
class StepLoader:
    """Loader of the batches of one data-parallel rank."""

    sets: Mapping[str, ShardReader]
    plan: Plan  #: the order; the loader never draws anything itself
    pipelines: Mapping[str, Mapping[str, SamplePipeline]]  #: task -> data set -> what makes its batches
    _: KW_ONLY
    dp_rank: int = 0  #: with the next two, this rank's part of each global batch
    dp_size: int = 1
    accumulation: int = 1
    #: "images" (first stage of a pipeline) gives batches without targets, "labels" (its last stage) batches
    #: without pixels, of the same samples in the same order; None (between them) steps without batches
    role: Role | None = "both"
    num_workers: int = 0  #: processes; 0 works in the caller's thread
    prefetch_steps: int = 2  #: how many steps may be ready beyond the one in use
    features: FeatureCache | None = None  #: those that it has are given to samples in place of pixels
    wait_seconds: float = field(default=0.0, init=False)  #: how long the last step made its consumer wait

    def steps(self, start: int, stop: int | None = None) -> Iterator[tuple[StepPlan, list[Batch]]]:
        """The plan of each global batch from `start` to `stop` (exclusive), with this rank's micro-batches.

        At `stop` the training is done: it decides the batches' `progress`. An error in a worker appears here,
        at its step. Leaving the loop in any way ends the workers.
        """
        numbers = range(start, sys.maxsize if stop is None else stop)
        accumulation = self.accumulation if self.role else 0
        split = (
            self.plan.split(self.plan.step(step), self.dp_rank, self.dp_size, self.accumulation)
            for step in numbers
        )
        parts = (part for micro in split for part in micro[:accumulation])
        maker = _BatchMaker(self.sets, self.pipelines, self.role or "both", self.features)
        batches = _made(maker, parts, self.num_workers, self.prefetch_steps * accumulation)
        remote = any(reader.manifest.remote for reader in self.sets.values())
        fetching = ThreadPoolExecutor(1, "fetch") if remote and accumulation else None
        try:
            for step in numbers:
                if fetching is not None:
                    first = step if step == start else step + _FETCHED_STEPS
                    for later in range(first, min(step + _FETCHED_STEPS + 1, numbers.stop)):
                        fetching.submit(self._fetch, later)
                began = time.perf_counter()
                micro_batches = list(itertools.islice(batches, accumulation))
                self.wait_seconds = time.perf_counter() - began
                done = 0.0 if stop is None else step / stop
                yield self.plan.step(step), [replace(batch, progress=done) for batch in micro_batches]
        finally:
            batches.close()
            if fetching is not None:
                fetching.shutdown(wait=False, cancel_futures=True)

    def first_images(self, stream: str, count: int) -> Iterator[Batch]:
        """The first images of a stream one by one, with pixels, the same in every process."""
        plans = (plan for plan in map(self.plan.step, itertools.count()) if plan.task == stream)
        parts = (one for plan in plans for one in self.plan.split(plan, 0, 1, len(plan.indices)))
        maker = _BatchMaker(self.sets, self.pipelines, "both", self.features)
        return _made(maker, itertools.islice(parts, count), 0, 0)

    def close(self) -> None:
        """Close the shards. A later step opens them again."""
        for reader in self.sets.values():
            reader.close()

    def _fetch(self, step: int) -> None:
        """Copy the shards of a step. An error appears where they are read, which tries again."""
        for part in self.plan.split(self.plan.step(step), self.dp_rank, self.dp_size, self.accumulation):
            manifest = self.sets[part.dataset].manifest
            for shard in np.unique(manifest.index["shard"][part.indices]).tolist():
                manifest.fetch(shard)


def evaluation_batches(
    reader: ShardReader,
    pipeline: SamplePipeline,
    batch_size: int,
    rank: int,
    world_size: int,
    places: npt.NDArray[np.int64],
    *,
    num_workers: int = 0,
) -> Iterator[Batch]:
    """This rank's batches of the images at some places of a split: each once over all ranks, equally many
    batches.

    Where the images do not divide evenly, ranks repeat the last one with `Batch.real` False: collective
    operations stay in step and no result is counted twice.
    """
    count = len(places)
    ours = rank + world_size * np.arange(-(-count // world_size))
    chunks = [ours[first : first + batch_size] for first in range(0, len(ours), batch_size)]
    name = reader.manifest.split  # stands for the task and the data set: there is one of each
    parts = [
        StepPlan(0, name, name, 0, 0, places[chunk.clip(max=count - 1)], np.zeros_like(chunk))
        for chunk in chunks
    ]
    maker = _BatchMaker({name: reader}, {name: {name: pipeline}})
    for chunk, batch in zip(chunks, _made(maker, parts, min(num_workers, len(parts)), ahead=2), strict=True):
        yield replace(batch, real=torch.from_numpy(chunk < count))


def _made(
    maker: _BatchMaker, parts: Iterable[StepPlan], workers: int, ahead: int
) -> Generator[Batch, None, None]:
    """The batches of `parts`, in order; up to `ahead` more are made ahead of the one in use."""
    options: dict[str, Any] = {}
    if workers:
        options = {"prefetch_factor": -(-(ahead + 1) // workers), "worker_init_fn": start_worker}
        options |= {"num_workers": workers, "multiprocessing_context": fork_server()}
    batches = iter(
        DataLoader(
            maker,
            batch_size=None,  # items are batches already
            sampler=parts,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # else it would draw from the global one, which dropout draws from too
            **options,
        )
    )
    try:
        for batch in batches:
            if isinstance(batch, ValueError):
                raise RankError(str(batch)) from batch  # a damaged sample is seen by the rank that reads it
            if isinstance(batch, Exception):
                raise batch
            yield batch
    finally:
        del batches  # its finaliser ends the processes
