"""Loader of one rank's micro-batches: reads a plan's samples ahead of their use, in workers that hold no state.

Shape letters: B images.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import torch

from visft_ds.data.batches import BatchMaker, Skipped
from visft_ds.data.dataset import DataSet, SamplePipeline
from visft_ds.data.features import FeatureCache
from visft_ds.data.plan import Plan, StepPlan
from visft_ds.data.samples import Batch, Upload
from visft_ds.data.shards import Role, ShardReader
from visft_ds.data.spans import Spent, spent
from visft_ds.data.workers import Caller, Made, Processes, Threads, WorkerKind, Workers


class StepLoader:
    """Loader of the batches of one data-parallel rank.

    Args:
        sets: data set -> DataSet, for every set of the plan.
        plan: the order; the loader never draws anything itself.
        pipelines: task -> data set -> transform and collate, for everything in the plan.
        dp_rank, dp_size, accumulation: this rank's part of each global batch.
        role: what to read. "images" (first stage of a pipeline) gives batches without targets, "labels" (its last
            stage) batches without pixels; both have the same samples, sizes and keys in the same order.
        workers, num_workers: what reads ahead; 0 works in the caller's thread, one step at a time.
        prefetch_steps: how many steps may be ready beyond the one in use.
        skip_damaged: how many damaged samples this process may replace before damage is an error. Only with role
            "both": processes that read images and labels apart would not agree on what is damaged.
        device: a GPU that batches are sent to (`Batch.sent`), one step ahead of the one in use. On any other device
            they stay on the host.

    `wait_seconds` is the time the last step made its consumer wait; `skipped` has every sample that was replaced.

    Raises:
        ValueError: a global batch that cannot be split as asked.
    """

    def __init__(
        self,
        sets: Mapping[str, DataSet],
        plan: Plan,
        pipelines: Mapping[str, Mapping[str, SamplePipeline]],
        *,
        dp_rank: int = 0,
        dp_size: int = 1,
        accumulation: int = 1,
        role: Role = "both",
        workers: WorkerKind = "threads",
        num_workers: int = 2,
        prefetch_steps: int = 2,
        skip_damaged: int = 0,
        device: torch.device | None = None,
    ) -> None:
        assert role == "both" or not skip_damaged
        plan.check_split(dp_size, accumulation)
        self.plan = plan
        self._dp_rank, self._dp_size, self._accumulation = dp_rank, dp_size, accumulation
        self._prefetch = prefetch_steps if num_workers else 0
        self._budget = skip_damaged
        self._maker = BatchMaker(sets, pipelines, role, plan if skip_damaged else None)
        self._sets, self._role = sets, role
        self._kind, self._number = workers, num_workers
        self._spent_by_processes: dict[str, Spent] = {}
        self._gpu = device if device is not None and device.type == "cuda" else None
        self.wait_seconds = 0.0
        self.skipped: list[Skipped] = []

    def keep_features(self, features: FeatureCache) -> None:
        """From the next call of `steps` on, give samples their cached features, if there are any, without pixels."""
        assert self._role == "both" and not self._budget, "a damaged picture would be read in some epochs only"
        self._maker = replace(self._maker, features=features)

    def steps(self, start: int, stop: int | None = None) -> Iterator[tuple[StepPlan, list[Batch]]]:
        """Steps start, start + 1, ... (to `stop`, exclusive; endless without) with this rank's micro-batches.

        The StepPlan is that of the whole global batch. An error in a worker appears here, at its step. Leaving the loop
        in any way, or closing the iterator, ends the workers.
        """
        step_plans: dict[int, StepPlan] = {}
        workers: Workers = Caller(self._maker)
        if self._number:
            workers = (Threads if self._kind == "threads" else Processes)(self._maker, self._number)
        made = workers.made(self._parts(start, stop, step_plans), self._prefetch * self._accumulation)
        upload, sender = None, None
        if self._gpu is not None:
            upload = Upload(self._gpu)
            if self._prefetch:
                # The host may wait for a batch there, and pins it, while it waits for the GPU here.
                sender = ThreadPoolExecutor(1, "upload", torch.cuda.set_device, (self._gpu,))
        coming: Future[list[Made]] | None = None
        step = start
        try:
            while stop is None or step < stop:
                began = time.perf_counter()
                batches = []
                for micro in self._next(made, upload) if coming is None else coming.result():
                    self._note(micro.skipped, micro.spent_by_process)
                    batches.append(micro.batch)
                self.wait_seconds = time.perf_counter() - began
                if sender is not None and step + 1 != stop:
                    coming = sender.submit(list, self._next(made, upload))
                step_plan = step_plans.pop(step)
                yield step_plan, batches
                step += 1
        finally:
            if sender is not None:
                sender.shutdown(wait=True, cancel_futures=True)
            made.close()  # type: ignore[attr-defined]  # a generator

    def close(self) -> None:
        """End all reading ahead, and close the shards. A later step opens them again."""
        for dataset in self._sets.values():
            dataset.reader.close()

    def spent(self) -> dict[str, Spent]:
        """Cost of reading and making samples so far, in this process and its workers."""
        return {name: here + self._spent_by_processes.get(name, Spent()) for name, here in spent().items()}

    def _parts(self, start: int, stop: int | None, step_plans: dict[int, StepPlan]) -> Iterator[StepPlan]:
        """This rank's micro-batches, in order."""
        step = start
        while stop is None or step < stop:
            step_plans[step] = self.plan.step(step)
            yield from self.plan.split(step_plans[step], self._dp_rank, self._dp_size, self._accumulation)
            step += 1

    def _next(self, made: Iterator[Made], upload: Upload | None) -> Iterator[Made]:
        """The micro-batches of the next step, sent where there is an upload."""
        for micro in itertools.islice(made, self._accumulation):
            yield micro if upload is None else replace(micro, batch=upload(micro.batch))

    def _note(self, skipped: list[Skipped], spent_by_process: Mapping[str, Spent]) -> None:
        """Record what a micro-batch skipped and cost. Raises ValueError once more is damaged than may be skipped."""
        self.skipped += skipped
        for name, more in spent_by_process.items():
            self._spent_by_processes[name] = self._spent_by_processes.get(name, Spent()) + more
        damaged = {(sample.dataset, sample.index): sample for sample in self.skipped}
        if len(damaged) > self._budget:
            reasons = "\n".join(f"  {sample.reason}" for sample in damaged.values())
            raise ValueError(
                f"{len(damaged)} damaged samples are more than the {self._budget} that may be skipped "
                f"(visft.data.skip_damaged):\n{reasons}"
            )


def evaluation_batches(
    reader: ShardReader,
    pipeline: SamplePipeline,
    batch_size: int,
    rank: int,
    world_size: int,
    limit: int | None = None,
    *,
    threads: int = 2,
) -> Iterator[Batch]:
    """This rank's batches of a split: each image (of the first `limit`) once over all ranks, equally many batches.

    Where the images do not divide evenly, ranks repeat the last one with `Batch.real` False: collective operations stay
    in step and no result is counted twice.
    """
    count = len(reader) if limit is None else min(limit, len(reader))
    rounds = -(-count // world_size)
    indices = rank + world_size * np.arange(rounds)
    name = reader.manifest.split  # stands for the task and the data set: there is one of each
    parts = [
        StepPlan(0, name, name, 0, 0, part.clip(max=count - 1), np.zeros(len(part), np.int64))
        for part in np.split(indices, range(batch_size, rounds, batch_size))
        if len(part)
    ]
    maker = BatchMaker({name: DataSet(reader)}, {name: {name: pipeline}})
    workers: Workers = Threads(maker, threads) if threads else Caller(maker)
    for number, made in enumerate(workers.made(parts, ahead=2)):
        real = indices[number * batch_size : (number + 1) * batch_size] < count
        yield replace(made.batch, real=torch.from_numpy(real))
