"""Task, samples and random keys of a step: a pure function of (seed, step), the same on every rank.

How a global batch is split over ranks, micro-batches and workers changes who computes, never what is
computed, in fp32 and without dropout (masks of dropout, and kernels of 16 bits, follow the division). A step
belongs to one task and takes its samples from one data set; each pair of the two counts its own epochs. All
arithmetic is on integers or on raw Philox words, which numpy keeps over its versions (NEP 19).

Shape letters: N samples of a data set, G samples of a global batch.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from visft_ds.settings.task_schema import SHARED

Int64Array = npt.NDArray[np.int64]

_WORD = 1 << 64
_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 divided by the golden ratio, made odd
#: Changes whenever the same arguments would give another order: a run never resumes in another one.
ORDER_VERSION = 3
#: Shards whose samples are mixed in a windowed order.
WINDOW = 4
#: Steps whose plans are kept: reading and fetching ahead make them before training needs them.
_STEPS_KEPT = 64


@dataclass(frozen=True, eq=False)  # a key of a cache: it is equal to itself only
class SetPlan:
    """A data set in a task: its eligible samples, and its weight relative to the task's other sets."""

    samples: Int64Array  #: (N,) positions in its index, or numbers of tiles (`settings/tiles.py`)
    weight: float = 1.0
    #: (N,) the shard of each, for a windowed order; None: any may follow any other
    shards: Int64Array | None = None


@dataclass(frozen=True)
class TaskPlan:
    """Schedule of a task."""

    sets: Mapping[str, SetPlan]  #: those that carry labels for the task
    batch_size: int  #: samples of an optimiser step over all ranks
    ratio: float = 1.0  #: share of the steps, relative to the other tasks' ratios


@dataclass(frozen=True)
class StepPlan:
    """Samples of a step, or of a micro-batch of it."""

    step: int
    task: str
    dataset: str  #: where all of its samples come from
    position: int  #: number of earlier steps of this task
    epoch: int  #: number of complete passes of this task through this data set before
    indices: Int64Array  #: (G,) of `SetPlan.samples`
    #: (G,) one key per sample for `generator`; differs between samples, epochs, sets, tasks and seeds
    keys: Int64Array


class Plan:
    """The order of tasks and samples in a run.

    Args:
        tasks: task name -> TaskPlan.
        seed: 0 or more.
        views: None: a sample has a new key in every epoch. A number: its keys, and with them its crops and
            flips, repeat after so many epochs and do not depend on the seed, so that kept features serve
            other runs too.

    Raises:
        ValueError: a data set with fewer samples than a global batch.
    """

    def __init__(self, tasks: Mapping[str, TaskPlan], seed: int, views: int | None = None) -> None:
        for name, task in tasks.items():
            key = "visft.shared" if name == SHARED else f"visft.tasks.{name}"
            for dataset, plan in task.sets.items():
                count = len(plan.samples)
                if count < task.batch_size:
                    batch_size = f"{key}.batch_size={task.batch_size}"
                    raise ValueError(
                        f"{dataset} has {count} samples for {name}, fewer than {batch_size}: lower it"
                    )
        # Sorted, so that the order of keys in a configuration file cannot change a run.
        self.tasks = dict(sorted(tasks.items()))
        self.seed = seed
        self.views = views
        # Each pair of a task and a set is in one epoch at a time: its order is kept.
        pairs = [(name, dataset) for name, task in tasks.items() for dataset in task.sets]
        self._orders = {pair: lru_cache(maxsize=1)(_order) for pair in pairs}
        self._step = lru_cache(maxsize=_STEPS_KEPT)(self._compute)

    def describe(self) -> str:
        """Line of a checkpoint: what a run and its continuation must have in common."""
        tasks = {}
        for name, task in self.tasks.items():
            sets = {}
            for dataset, plan in sorted(task.sets.items()):
                windowed = plan.shards is not None
                sets[dataset] = [len(plan.samples), plan.weight, windowed]
            tasks[name] = [task.batch_size, task.ratio, sets]
        digest = hashlib.sha256(json.dumps([tasks, self.views]).encode()).hexdigest()
        return f"version {ORDER_VERSION}, seed {self.seed}, {digest}"

    def steps_per_epoch(self, task: str, dataset: str) -> int:
        """Steps in which `task` sees each sample of the set at most once; an incomplete last batch is
        dropped.
        """
        plan = self.tasks[task]
        return len(plan.sets[dataset].samples) // plan.batch_size

    def step(self, step: int) -> StepPlan:
        """The global batch of a step. Nobody may change its arrays."""
        return self._step(step)

    def _compute(self, step: int) -> StepPlan:
        ratios = {name: task.ratio for name, task in self.tasks.items()}
        task, position = _turn(ratios, _hash(self.seed), step)
        sets = self.tasks[task].sets
        weights = {name: sets[name].weight for name in sorted(sets)}
        dataset, earlier = _turn(weights, _hash(self.seed, task), position)
        plan = sets[dataset]
        epoch, batch = divmod(earlier, self.steps_per_epoch(task, dataset))
        key = _hash(self.seed, task, dataset, epoch)
        order = self._orders[task, dataset](plan, key)
        size = self.tasks[task].batch_size
        indices = plan.samples[order[batch * size :][:size]]
        if plan.shards is not None:
            # Each machine then needs few of the window's shards; who computes changes no result.
            indices = np.sort(indices)
        if self.views is not None:
            key = _hash(task, dataset, epoch % self.views)
        keys = [_hash(key, index) >> 1 for index in indices.tolist()]
        return StepPlan(
            step=step,
            task=task,
            dataset=dataset,
            position=position,
            epoch=epoch,
            indices=indices,
            keys=np.array(keys, dtype=np.int64),
        )

    def split(self, step_plan: StepPlan, dp_rank: int, dp_size: int, accumulation: int) -> list[StepPlan]:
        """All micro-batches of a rank, in order; those of all ranks are disjoint and together are the
        step.
        """
        samples = len(step_plan.indices)
        size, rest = divmod(samples, dp_size * accumulation)
        assert rest == 0, (samples, dp_size, accumulation)
        assert 0 <= dp_rank < dp_size, (dp_rank, dp_size)
        plans = []
        for micro in range(accumulation):
            first = (micro * dp_size + dp_rank) * size
            indices = step_plan.indices[first : first + size]
            keys = step_plan.keys[first : first + size]
            plans.append(replace(step_plan, indices=indices, keys=keys))
        return plans


def _turn(shares: Mapping[str, float], offset: int, turn: int) -> tuple[str, int]:
    """Whose turn it is, and how many turns the name had before, exact and without counting them.

    Names take turns by their shares, tasks over steps and data sets over the steps of a task. Turn i is a
    point on a circle, and each name an arc of it as long as its share. The points form a golden-ratio
    (low-discrepancy) sequence, so that counts never drift from the shares.

    Args:
        shares: name -> share relative to the others, above 0.
        offset: where on the circle to begin, in [0, 2**64).
    """
    ends = list(accumulate(map(Fraction, shares.values())))
    bounds = [0]  # of the arcs
    for end in ends:
        bounds.append(round(end * _WORD / ends[-1]))
    point = (turn * _GOLDEN + offset) % _WORD
    number = bisect_right(bounds, point) - 1
    # (x mod M < bound) equals floor(x / M) - floor((x - bound) / M), and x is linear in the turn.
    from_start = _floor_sum(turn, offset - bounds[number])
    from_end = _floor_sum(turn, offset - bounds[number + 1])
    return list(shares)[number], from_start - from_end


def _floor_sum(n: int, b: int) -> int:
    """Sum of floor((_GOLDEN * i + b) / 2**64) for i in [0, n) (Euclid-like reduction)."""
    m = _WORD
    a = _GOLDEN
    total = 0
    while True:
        total += (n - 1) * n // 2 * (a // m)
        total += n * (b // m)
        a %= m
        b %= m
        last = a * n + b
        if last < m:
            return total
        n, b = divmod(last, m)
        a, m = m, a


def _order(plan: SetPlan, key: int) -> Int64Array:
    """(N,) a random permutation. A windowed one needs each shard in one stretch: shards are shuffled, then
    samples within `WINDOW` of them."""
    words = _words(key, 0, len(plan.samples))
    if plan.shards is None:
        return np.argsort(words, kind="stable")
    shards, shard_of_sample = np.unique(plan.shards, return_inverse=True)
    shuffled = np.argsort(_words(key, 1, len(shards)), kind="stable")
    positions = np.argsort(shuffled, kind="stable")  # of each shard among the shuffled ones
    return np.lexsort((words, positions[shard_of_sample] // WINDOW))


def _words(key: int, stream: int, count: int) -> npt.NDArray[np.uint64]:
    """Random words of 64 bits, which stay the same over numpy's versions."""
    philox = np.random.Philox(key=np.array([key, stream], dtype=np.uint64))
    return philox.random_raw(count)


def _hash(*values: int | str) -> int:
    """64 bits of some integers and names; the same in every process, unlike Python's own."""
    digest = hashlib.blake2b("\0".join(map(str, values)).encode(), digest_size=8)
    return int.from_bytes(digest.digest(), "little")
