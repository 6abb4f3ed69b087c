"""Which task a step trains, on which samples and with which random keys: a pure function of (seed, step).

Nothing here has a state but the step, so a run resumes at any step at no cost, and every rank knows what all others do
without talking to them. The global batch is fixed; how it is split over data-parallel ranks, micro-batches and workers
changes who computes, never what is computed.

All arithmetic is on integers or on raw Philox words, whose values numpy guarantees to stay the same over its versions
(NEP 19 guarantees that for bit generators but not for `Generator.permutation`).

Shape letters: G samples in the global batch.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import accumulate

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]
UInt64Array = npt.NDArray[np.uint64]

_WORD = 1 << 64
_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 divided by the golden ratio, made odd
_KEY_MASK = (1 << 63) - 1  # keys travel as int64


@dataclass(frozen=True)
class TaskPlan:
    """How one task takes part: what it may draw from, how much at a time, how often.

    `samples` is the size of the split, or the eligible positions of its index (for instance, those with captions).
    `ratio` is the task's share of the steps relative to the other tasks' ratios.
    """

    samples: int | Int64Array
    batch_size: int
    ratio: float = 1.0


@dataclass(frozen=True)
class StepPlan:
    """What one step (or one micro-batch of it) works on."""

    step: int
    task: str
    epoch: int  #: how many times this task has been through its samples before
    position: int  #: how many steps this task had before this one
    indices: Int64Array  #: (G,) positions in the split's index
    keys: Int64Array  #: (G,) one key per sample for `generator`; differs between samples, epochs, tasks and seeds


def generator(key: int, stream: int = 0) -> np.random.Generator:
    """Random numbers that belong to a key, whoever asks for them and when.

    `stream` separates users of the same key, such as transforms (0) and a loss that samples points (any other number).
    """
    return np.random.Generator(np.random.Philox(key=np.array([key, stream], dtype=np.uint64)))


def _mix(words: UInt64Array) -> UInt64Array:
    """Scatter 64-bit words (the finaliser of SplitMix64, Steele et al., OOPSLA 2014)."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _mix_int(*values: int) -> int:
    """One 64-bit word from several integers, in their order."""
    state = np.zeros(1, dtype=np.uint64)
    for value in values:
        state = _mix(state + np.array([(value + _GOLDEN) % _WORD], dtype=np.uint64))
    return int(state[0])


def _floor_sum(n: int, m: int, a: int, b: int) -> int:
    """Sum of floor((a * i + b) / m) for i in [0, n), in O(log m) steps (Euclid-like reduction)."""
    total = 0
    while True:
        total += (n - 1) * n // 2 * (a // m) + n * (b // m)
        a, b = a % m, b % m
        top = a * n + b
        if top < m:
            return total
        n, b = divmod(top, m)
        m, a = a, m


class Plan:
    """The order of everything in a run.

    Args:
        tasks: task name -> TaskPlan.
        seed: any integer in [0, 2**63).

    Raises:
        ValueError: no task; a ratio or batch size that is not positive; fewer samples than one global batch.
    """

    def __init__(self, tasks: Mapping[str, TaskPlan], seed: int) -> None:
        if not tasks:
            raise ValueError("no task to plan: give at least one task with a ratio above 0")
        if not 0 <= seed < 1 << 63:
            raise ValueError(f"seed {seed} is not allowed: give an integer from 0 to 2**63 - 1")
        for name, task in tasks.items():
            _check_task(name, task)
        # Sorted, so that the order of keys in a configuration file cannot change a run.
        self.tasks = {name: tasks[name] for name in sorted(tasks)}
        self.seed = seed
        shares = [Fraction(task.ratio) for task in self.tasks.values()]
        total = sum(shares)
        self._bounds = [0, *(round(part * _WORD / total) for part in accumulate(shares))]
        self._names = list(self.tasks)
        self._offset = _mix_int(seed)
        self._orders: dict[str, tuple[int, Int64Array]] = {}
        self._lock = threading.Lock()

    def task_of(self, step: int) -> str:
        """The one task of a step, on all ranks.

        The steps' places on a circle form a golden-ratio sequence, whose points are spread as evenly as possible, so a
        task's count of steps stays within a few of its exact share at every moment.
        """
        place = (step * _GOLDEN + self._offset) % _WORD
        for name, bound in zip(self._names, self._bounds[1:], strict=True):
            if place < bound:
                return name
        raise AssertionError("the last bound is 2**64")

    def steps_before(self, step: int, task: str) -> int:
        """How many of the steps [0, step) belong to `task`; exact, and as fast at step 10**9 as at step 10."""
        place = self._names.index(task)
        return self._count_below(step, self._bounds[place + 1]) - self._count_below(step, self._bounds[place])

    def steps_per_epoch(self, task: str) -> int:
        """Steps in which `task` sees each of its samples at most once; a rest smaller than a batch is left out."""
        plan = self.tasks[task]
        return _count(plan) // plan.batch_size

    def step(self, step: int) -> StepPlan:
        """The whole global batch of a step."""
        if step < 0:
            raise ValueError(f"step {step} is not allowed: steps count from 0")
        task = self.task_of(step)
        plan = self.tasks[task]
        position = self.steps_before(step, task)
        epoch, start = divmod(position, self.steps_per_epoch(task))
        first = start * plan.batch_size
        places = self._order(task, epoch)[first : first + plan.batch_size]
        indices = places if isinstance(plan.samples, int) else plan.samples[places]
        return StepPlan(step, task, epoch, position, indices, self._keys(task, epoch, indices))

    def micro_batch(self, step: int, dp_rank: int, dp_size: int, accumulation: int, micro: int) -> StepPlan:
        """The part of a step that one rank computes in its `micro`-th micro-batch.

        The parts of all ranks and micro-batches are disjoint and together are `step(step)`, for any `dp_size` and
        `accumulation` whose product divides the global batch.
        """
        return self.split(self.step(step), dp_rank, dp_size, accumulation)[micro]

    def split(self, whole: StepPlan, dp_rank: int, dp_size: int, accumulation: int) -> list[StepPlan]:
        """All micro-batches of one rank for a step planned by `step`, in order."""
        if not 0 <= dp_rank < dp_size:
            raise ValueError(f"data-parallel rank {dp_rank} is not allowed: ranks go from 0 to {dp_size - 1}")
        self.check_split(dp_size, accumulation)
        size = len(whole.indices) // (dp_size * accumulation)
        starts = [(micro * dp_size + dp_rank) * size for micro in range(accumulation)]
        return [replace(whole, indices=whole.indices[s : s + size], keys=whole.keys[s : s + size]) for s in starts]

    def check_split(self, dp_size: int, accumulation: int) -> None:
        """Raise ValueError unless every task's global batch divides evenly over ranks and micro-batches."""
        for name, plan in self.tasks.items():
            parts = dp_size * accumulation
            if parts < 1 or plan.batch_size % parts:
                raise ValueError(
                    f"task {name!r}: a global batch of {plan.batch_size} cannot be split over {dp_size} data-parallel "
                    f"ranks x {accumulation} micro-batches; give a multiple of {parts}, or fewer ranks"
                )

    def _count_below(self, steps: int, bound: int) -> int:
        # (x mod M < bound) equals floor(x / M) - floor((x - bound) / M), and x is linear in the step.
        above = _floor_sum(steps, _WORD, _GOLDEN, self._offset - bound)
        return _floor_sum(steps, _WORD, _GOLDEN, self._offset) - above

    def _order(self, task: str, epoch: int) -> Int64Array:
        with self._lock:
            known = self._orders.get(task)
            if known is not None and known[0] == epoch:
                return known[1]
            words = np.array([_mix_int(self.seed, zlib.crc32(task.encode())), epoch], dtype=np.uint64)
            raw = np.random.Philox(key=words).random_raw(_count(self.tasks[task]))
            order = np.argsort(raw, kind="stable").astype(np.int64)
            self._orders[task] = (epoch, order)
            return order

    def _keys(self, task: str, epoch: int, indices: Int64Array) -> Int64Array:
        base = np.uint64(_mix_int(self.seed, zlib.crc32(task.encode()), epoch, 1))
        mixed = _mix(_mix(indices.astype(np.uint64) * np.uint64(_GOLDEN)) ^ base)
        return (mixed & np.uint64(_KEY_MASK)).astype(np.int64)


def _count(plan: TaskPlan) -> int:
    return plan.samples if isinstance(plan.samples, int) else len(plan.samples)


def _check_task(name: str, task: TaskPlan) -> None:
    if not task.ratio > 0 or task.ratio == float("inf"):
        raise ValueError(f"task {name!r}: ratio {task.ratio} is not allowed: give a finite number above 0")
    if task.batch_size < 1:
        raise ValueError(f"task {name!r}: global batch {task.batch_size} is not allowed: give at least 1")
    if _count(task) < task.batch_size:
        raise ValueError(
            f"task {name!r}: {_count(task)} samples are fewer than one global batch of {task.batch_size}; "
            f"give a global batch of at most {_count(task)}, or a larger data set"
        )
