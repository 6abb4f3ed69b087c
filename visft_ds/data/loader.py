"""Micro-batches of a rank, made ahead of their use by torch's DataLoader.

The plan says which; workers hold no state.

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

from visft_ds.data.dataset import SamplePipeline, read_donor, read_raw, read_tile
from visft_ds.data.features import FeatureCache, View
from visft_ds.data.plan import Plan, StepPlan
from visft_ds.data.samples import Batch, Sample
from visft_ds.data.shards import Role, ShardReader
from visft_ds.data.workers import fork_server, start_worker
from visft_ds.errors import RankError
from visft_ds.randomness import generator

#: Steps for which remote shards are fetched ahead.
_FETCHED_STEPS = 32
#: Random numbers of what is pasted: flips and zooms stay as they are without it.
_PASTE_STREAM = 1 << 32


@dataclass(frozen=True)
class _BatchMaker(Dataset[Batch | Exception]):
    """Batches by the plan of each, as workers make them.

    Samples whose features are kept come without pixels.
    """

    sets: Mapping[str, ShardReader]
    pipelines: Mapping[str, Mapping[str, SamplePipeline]]  #: task -> data set -> what makes its batches
    role: Role = "both"
    features: FeatureCache | None = None

    def __getitem__(self, plan: StepPlan) -> Batch | Exception:
        pipeline = self.pipelines[plan.task][plan.dataset]
        pairs = zip(plan.indices.tolist(), plan.keys.tolist(), strict=True)
        try:
            return pipeline.collate([self._sample(pipeline, plan.dataset, *pair) for pair in pairs])
        except (ValueError, OSError, RuntimeError) as error:
            return error  # raised by the consumer: torch would wrap it into another message

    def _sample(self, pipeline: SamplePipeline, dataset: str, index: int, key: int) -> Sample:
        """A sample of a data set under the transform that its random key draws."""
        view = None if self.features is None else self.features.get(key, index)
        role = self.role if view is None else "labels"
        reader = self.sets[dataset]
        if pipeline.tiles is None:
            raw = read_raw(reader, index, role)
        else:
            raw = read_tile(reader, index, pipeline.tiles, role)
        if pipeline.paste is not None:
            numbers = generator(key, _PASTE_STREAM)
            donor = read_donor(reader, index % len(reader), role, numbers)
            if donor is not None:
                raw = pipeline.paste(raw, donor, numbers)
        sample = pipeline.transform(raw, generator(key))
        if self.features is not None and view is None:
            assert sample.image is not None
            _, height, width = sample.image.shape
            view = View((height, width))
        # Without labels, empty targets would claim that there is nothing in the image.
        targets = {} if self.role == "images" else sample.targets
        return replace(sample, random_key=key, targets=targets, view=view)


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

    def steps(
        self, start: int, stop: int | None = None
    ) -> Generator[tuple[StepPlan, list[Batch]], None, None]:
        """The plan of each global batch from `start` to `stop` (exclusive), with this rank's micro-batches.

        At `stop` the training is done: it decides the batches' `progress`. An error in a worker appears here,
        at its step. Leaving the loop in any way ends the workers.
        """
        numbers = range(start, sys.maxsize if stop is None else stop)
        accumulation = self.accumulation if self.role else 0
        plans = (plan for step in numbers for plan in self._micro_batches(step)[:accumulation])
        maker = _BatchMaker(self.sets, self.pipelines, self.role or "both", self.features)
        batches = _load(maker, plans, self.num_workers, self.prefetch_steps * accumulation)
        remote = any(reader.manifest.is_remote for reader in self.sets.values())
        fetching = ThreadPoolExecutor(1, "fetch") if remote and accumulation else None
        try:
            for step in numbers:
                if fetching is not None:
                    first = step if step == start else step + _FETCHED_STEPS
                    last = min(step + _FETCHED_STEPS, numbers.stop - 1)
                    for later in range(first, last + 1):
                        fetching.submit(self._fetch, later)
                began = time.perf_counter()
                micro_batches = list(itertools.islice(batches, accumulation))
                self.wait_seconds = time.perf_counter() - began
                progress = 0.0 if stop is None else step / stop
                yield self.plan.step(step), [replace(batch, progress=progress) for batch in micro_batches]
        finally:
            batches.close()
            if fetching is not None:
                fetching.shutdown(wait=False, cancel_futures=True)

    def first_images(self, stream: str, count: int) -> Iterator[Batch]:
        """The first images of a stream one by one, with pixels, the same in every process."""
        maker = _BatchMaker(self.sets, self.pipelines, "both", self.features)
        return _load(maker, itertools.islice(self._single_images(stream), count), workers=0, ahead=0)

    def _single_images(self, stream: str) -> Iterator[StepPlan]:
        """The images of a stream's steps as micro-batches of one."""
        for step in itertools.count():
            plan = self.plan.step(step)
            if plan.task == stream:
                yield from self.plan.split(plan, dp_rank=0, dp_size=1, accumulation=len(plan.indices))

    def _micro_batches(self, step: int) -> list[StepPlan]:
        """The plans of this rank's micro-batches in a step."""
        return self.plan.split(self.plan.step(step), self.dp_rank, self.dp_size, self.accumulation)

    def close(self) -> None:
        """Close the shards. A later step opens them again."""
        for reader in self.sets.values():
            reader.close()

    def _fetch(self, step: int) -> None:
        """Copy the shards of a step. An error appears where they are read, which tries again."""
        for plan in self._micro_batches(step):
            manifest = self.sets[plan.dataset].manifest
            pictures = plan.indices % len(manifest)  # of tiles, too
            shards = np.unique(manifest.index["shard"][pictures])
            for shard in shards.tolist():
                manifest.fetch(shard)


def evaluation_batches(
    reader: ShardReader,
    pipeline: SamplePipeline,
    batch_size: int,
    rank: int,
    world_size: int,
    positions: npt.NDArray[np.int64],
    *,
    num_workers: int = 0,
) -> Iterator[Batch]:
    """This rank's batches of the images at some positions of a split, or of some tiles by their numbers: each
    once over all ranks, equally many batches.

    Where the images do not divide evenly, ranks repeat the last one with `Batch.real` False: collective
    operations stay in step and no result is counted twice.
    """
    count = len(positions)
    per_rank = -(-count // world_size)
    ours = rank + world_size * np.arange(per_rank)  # numbers from `count` on are repeats
    name = reader.manifest.split  # stands for the task and the data set: there is one of each
    real = list[npt.NDArray[np.bool_]]()
    plans = list[StepPlan]()
    for first in range(0, per_rank, batch_size):
        numbers = ours[first : first + batch_size]
        real.append(numbers < count)
        indices = positions[numbers.clip(max=count - 1)]
        keys = np.zeros_like(numbers)
        plans.append(
            StepPlan(step=0, task=name, dataset=name, position=0, epoch=0, indices=indices, keys=keys)
        )
    maker = _BatchMaker({name: reader}, {name: {name: pipeline}})
    batches = _load(maker, plans, min(num_workers, len(plans)), ahead=2)
    for batch, real_images in zip(batches, real, strict=True):
        yield replace(batch, real=torch.from_numpy(real_images))


def _load(
    maker: _BatchMaker, plans: Iterable[StepPlan], workers: int, ahead: int
) -> Generator[Batch, None, None]:
    """The batches of `plans`, in order; up to `ahead` more are made ahead of the one in use."""
    options: dict[str, Any] = {}
    if workers:
        options = {
            "num_workers": workers,
            "prefetch_factor": -(-(ahead + 1) // workers),
            "worker_init_fn": start_worker,
            "multiprocessing_context": fork_server(),
        }
    loader = DataLoader(
        maker,
        batch_size=None,  # items are batches already
        sampler=plans,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else it would draw from the global one, from which dropout draws too
        **options,
    )
    batches = iter(loader)
    try:
        for batch in batches:
            if isinstance(batch, ValueError):
                raise RankError(str(batch)) from batch  # a damaged sample is seen by the rank that reads it
            if isinstance(batch, Exception):
                raise batch
            yield batch
    finally:
        del batches  # its finaliser ends the processes
