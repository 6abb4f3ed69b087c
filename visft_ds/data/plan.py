"""Task, samples and random keys of a step: a pure function of (seed, step).

Nothing here has a state but the step, so a run resumes at any step at no cost, and every rank knows what all others do
without communication. The global batch is fixed; how it is split over data-parallel ranks, micro-batches and workers
changes who computes, never what is computed.

A step belongs to one task and takes its samples from one data set among those that carry labels for the task. Each
pair of the two counts its own epochs. Where all tasks share one forward pass (mode "shared"), the plan has a single
task, "shared".

All arithmetic is on integers or on raw Philox words, whose values numpy guarantees to stay the same over its versions
(NEP 19 guarantees that for bit generators but not for `Generator.permutation`).

Shape letters: G samples in the global batch.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from visft_ds.config.task_schema import SHARED
from visft_ds.data.interleave import Interleaving
from visft_ds.data.permutation import GOLDEN, Int64Array, hash_ints, hash_words, shuffled, shuffled_in_windows

_KEY_MASK = (1 << 63) - 1  # keys become int64 tensors
#: Changes whenever the same arguments would give another order: a run never resumes in the order of another release.
ORDER_VERSION = 2

Shuffle = Literal["full", "windowed"]
_SHUFFLES = {"full": shuffled, "windowed": shuffled_in_windows}


@dataclass(frozen=True)
class SetPlan:
    """Share of a data set in a task: its eligible samples, and its weight relative to the task's other sets."""

    samples: Int64Array
    weight: float = 1.0


@dataclass(frozen=True)
class TaskPlan:
    """Schedule of a task."""

    sets: Mapping[str, SetPlan]  #: by data set; only sets that carry labels for the task
    batch_size: int  #: samples of an optimiser step over all ranks
    ratio: float = 1.0  #: the task's share of the steps, relative to the other tasks' ratios


@dataclass(frozen=True)
class StepPlan:
    """Samples of a step, or of a micro-batch of it."""

    step: int
    task: str
    dataset: str  #: where all of its samples come from
    position: int  #: number of earlier steps of this task
    epoch: int  #: number of complete passes of this task through this data set before
    indices: Int64Array  #: (G,) positions in the index of the data set
    keys: Int64Array  #: (G,) one key per sample for `generator`; differs between samples, epochs, sets, tasks and seeds


def generator(key: int, stream: int = 0) -> np.random.Generator:
    """Random numbers that are a function of a key and a stream, whoever draws them and when.

    `stream` separates users of the same key: transforms draw from 0, a loss that samples points from the others.
    """
    return np.random.Generator(np.random.Philox(key=np.array([key, stream], dtype=np.uint64)))


class Plan:
    """The order of tasks and samples in a run.

    Args:
        tasks: task name -> TaskPlan.
        seed: any integer in [0, 2**63).
        shuffle: "full" permutes a whole data set; "windowed" keeps samples that are neighbours in the shards near each
            other, for storage where random access is slow (see `permutation.shuffled_in_windows`).
        views: None: a sample has a new key in every epoch. A number: its keys, and with them its crops and flips,
            repeat after so many epochs and do not depend on the seed, so that cached features serve other runs too.

    Raises:
        ValueError: a seed out of range, or a data set with fewer samples than one global batch.
    """

    def __init__(
        self, tasks: Mapping[str, TaskPlan], seed: int, shuffle: Shuffle = "full", views: int | None = None
    ) -> None:
        if not 0 <= seed < 1 << 63:
            raise ValueError(f"seed {seed} is not allowed: give an integer from 0 to 2**63 - 1")
        for name, task in tasks.items():
            _check_task(name, task)
        # Sorted, so that the order of keys in a configuration file cannot change a run.
        self.tasks = {name: tasks[name] for name in sorted(tasks)}
        self.seed = seed
        self.shuffle: Shuffle = shuffle
        self.views = views
        self._task_order = Interleaving({name: task.ratio for name, task in self.tasks.items()}, hash_ints(seed))
        self._set_order = {
            name: Interleaving(
                {dataset: task.sets[dataset].weight for dataset in sorted(task.sets)}, hash_ints(seed, _hash_of(name))
            )
            for name, task in self.tasks.items()
        }

    def state(self, step: int) -> dict[str, int | str]:
        """State for a checkpoint after `step` steps: a run with another one would see other samples."""
        return {"step": step, "seed": self.seed, "version": ORDER_VERSION, "fingerprint": self.fingerprint()}

    def describe(self) -> str:
        """The state without its step, as one line of a checkpoint (which has the step already)."""
        return f"version {ORDER_VERSION}, seed {self.seed}, {self.shuffle} shuffle, {self.fingerprint()}"

    def fingerprint(self) -> str:
        """Digest of how samples are drawn, without the seed: tasks, sets, numbers of samples, weights, shuffle."""
        tasks = {
            name: [
                task.batch_size,
                task.ratio,
                {dataset: [len(part.samples), part.weight] for dataset, part in sorted(task.sets.items())},
            ]
            for name, task in self.tasks.items()
        }
        views = [] if self.views is None else [self.views]
        return hashlib.sha256(json.dumps([self.shuffle, tasks, *views]).encode()).hexdigest()

    def task_of(self, step: int) -> str:
        """The task of a step, on all ranks."""
        return self._task_order.at(step)

    def steps_before(self, step: int, task: str) -> int:
        """Number of steps of `task` in [0, step); exact, and as fast at step 10**9 as at step 10."""
        return self._task_order.before(step, task)

    def steps_per_epoch(self, task: str, dataset: str) -> int:
        """Steps in which `task` sees each sample of the set at most once; an incomplete last batch is dropped."""
        plan = self.tasks[task]
        return len(plan.sets[dataset].samples) // plan.batch_size

    def step(self, step: int) -> StepPlan:
        """The global batch of a step."""
        if step < 0:
            raise ValueError(f"step {step} is not allowed: steps count from 0")
        task = self.task_of(step)
        plan = self.tasks[task]
        position = self.steps_before(step, task)
        dataset = self._set_order[task].at(position)
        samples = plan.sets[dataset].samples
        earlier = self._set_order[task].before(position, dataset)
        epoch, batch = divmod(earlier, self.steps_per_epoch(task, dataset))
        places = np.arange(batch * plan.batch_size, (batch + 1) * plan.batch_size)  # in the epoch's order
        key = hash_ints(self.seed, _hash_of(task), _hash_of(dataset), epoch)
        indices = samples[_SHUFFLES[self.shuffle](places, len(samples), key)]
        if self.shuffle == "windowed":
            indices = np.sort(indices)  # each rank reads neighbours: which rank computes what changes no result
        if self.views is not None:
            key = hash_ints(_hash_of(task), _hash_of(dataset), epoch % self.views)
        return StepPlan(step, task, dataset, position, epoch, indices, _keys(indices, hash_ints(key, 1)))

    def substitute(self, part: StepPlan, key: int, attempt: int) -> int:
        """Index of the substitute for a damaged sample of `part`: a function of its key and the number of attempts."""
        samples = self.tasks[part.task].sets[part.dataset].samples
        return int(samples[hash_ints(key, attempt) % len(samples)])

    def split(self, step_plan: StepPlan, dp_rank: int, dp_size: int, accumulation: int) -> list[StepPlan]:
        """All micro-batches of a rank for a step planned by `step`, in order.

        Those of all ranks are disjoint and together are the step, for any `dp_size` and `accumulation` whose product
        divides the global batch.
        """
        assert 0 <= dp_rank < dp_size
        self.check_split(dp_size, accumulation)
        size = len(step_plan.indices) // (dp_size * accumulation)
        starts = [(micro * dp_size + dp_rank) * size for micro in range(accumulation)]
        return [
            replace(step_plan, indices=step_plan.indices[s : s + size], keys=step_plan.keys[s : s + size])
            for s in starts
        ]

    def check_split(self, dp_size: int, accumulation: int) -> None:
        """Raise ValueError unless every task's global batch divides evenly over ranks and micro-batches."""
        for name, plan in self.tasks.items():
            parts = dp_size * accumulation
            if parts < 1 or plan.batch_size % parts:
                raise ValueError(
                    f"task {name!r}: a global batch of {plan.batch_size} cannot be split over {dp_size} data-parallel "
                    f"ranks x {accumulation} micro-batches; give a multiple of {parts}, or fewer ranks"
                )


def _hash_of(name: str) -> int:
    """Hash of a name that is the same in every process, unlike Python's own."""
    return zlib.crc32(name.encode())


def _keys(indices: Int64Array, base: int) -> Int64Array:
    hashed = hash_words(hash_words(indices.astype(np.uint64) * np.uint64(GOLDEN)) ^ np.uint64(base))
    return (hashed & np.uint64(_KEY_MASK)).astype(np.int64)


def _check_task(name: str, task: TaskPlan) -> None:
    for dataset, part in task.sets.items():
        if len(part.samples) < task.batch_size:
            raise ValueError(
                f"task {name!r}: data set {dataset!r} has {len(part.samples)} samples for it, fewer than one global "
                f"batch of {task.batch_size}; give a larger data set, or a global batch of at most {len(part.samples)} "
                f"({'visft.shared' if name == SHARED else f'visft.tasks.{name}'}.batch_size)"
            )
