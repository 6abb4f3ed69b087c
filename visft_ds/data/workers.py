"""Workers that make batches: the caller, threads, or processes; all give the same batches in the same order.

Threads share the index and hand batches over without a copy, but Python runs in one of them at a time: decoding,
resizing, hashing and reading release the interpreter lock, the rest of a sample's work does not. Processes do not have
that limit and pay for it by copying every batch through shared memory.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import wait
from typing import Literal, Protocol

import torch
from torch.utils.data import DataLoader, Dataset

from visft_ds.data.batches import BatchMaker, Skipped
from visft_ds.data.plan import StepPlan
from visft_ds.data.samples import Batch, Sample
from visft_ds.data.spans import Spent, measure_cpu, measures_cpu, spent

WorkerKind = Literal["threads", "processes"]

#: More threads than this do not help: up to 43 % of a sample's time may hold the interpreter lock,
#: as measured, so little more than two can be busy at once.
MOST_THREADS = 3
MOST_PROCESSES = 8
#: Samples that a thread makes without a pause.
_RUN = 4


@dataclass(frozen=True)
class Made:
    """A batch and how it was made."""

    batch: Batch
    skipped: list[Skipped]
    spent_by_process: dict[str, Spent]  #: cost by kind of work in a worker process; empty where this process made it


class Workers(Protocol):
    """Makes batches ahead of their use."""

    def made(self, parts: Iterable[StepPlan], ahead: int) -> Iterator[Made]:
        """The batches of `parts`, in order; up to `ahead` more are made ahead of the one in use.

        An error in making a batch appears when it is its turn. Leaving the loop in any way ends the workers.
        """
        ...


def choose_workers(kind: str, number: int | None, *, cores: int, processes: int) -> tuple[WorkerKind, int, str]:
    """(kind, number of workers, why) of each training process.

    Args:
        kind: "threads", "processes" or "auto".
        number: None for one that suits the machine.
        cores: of this host that may be used.
        processes: training processes on this host, which share the cores.
    """
    share = max(1, cores // processes)
    mine = f"{cores} cores for {processes} process{'es' if processes > 1 else ''}"
    wanted = number if number is not None else min(MOST_PROCESSES, max(2, share - 1))
    if kind == "auto":
        kind = "threads" if share <= MOST_THREADS or wanted <= MOST_THREADS else "processes"
        limit = f"more than {MOST_THREADS} threads would wait for each other's Python"
        reason = f"auto: {mine}; {limit if kind == 'processes' else 'threads cost least where few suffice'}"
    else:
        reason = f"as configured; {mine}"
    if number is None and kind == "threads":
        wanted = min(wanted, MOST_THREADS)
    return ("processes" if kind == "processes" else "threads"), wanted, reason


class Caller:
    """No workers: batches are made when they are asked for, one at a time."""

    def __init__(self, maker: BatchMaker) -> None:
        self._maker = maker

    def made(self, parts: Iterable[StepPlan], ahead: int) -> Iterator[Made]:
        for part in parts:
            yield Made(*self._maker.make(part), {})


class Threads:
    """Threads that make samples in the order of their batches; the one that finishes the last of a batch collates."""

    def __init__(self, maker: BatchMaker, number: int) -> None:
        self._maker, self._number = maker, number

    def made(self, parts: Iterable[StepPlan], ahead: int) -> Iterator[Made]:
        coming, waiting = iter(parts), deque[_Job]()
        pool = ThreadPoolExecutor(self._number, "data")
        try:
            while True:
                while len(waiting) <= ahead and (part := next(coming, None)) is not None:
                    waiting.append(_Job(self._maker, pool, part, self._number))
                if not waiting:
                    return
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


class _Job:
    """Batch in the making, in runs of a few samples: a hand-over between threads costs a tenth of a sample."""

    def __init__(self, maker: BatchMaker, pool: ThreadPoolExecutor, part: StepPlan, threads: int) -> None:
        self._maker, self._part = maker, part
        self._samples: list[Sample | None] = [None] * len(part.indices)
        self._left = len(part.indices)
        self._skipped: list[Skipped] = []
        self._lock = threading.Lock()
        run = min(_RUN, math.ceil(len(part.indices) / threads))
        self._futures: list[Future[Batch | None]] = [
            pool.submit(self._make, range(first, min(first + run, len(part.indices))))
            for first in range(0, len(part.indices), run)
        ]

    def result(self) -> Made:
        """Wait for the batch; raises what went wrong with a sample."""
        made = [future.result() for future in self._futures]
        return Made(next(batch for batch in made if batch is not None), self._skipped, {})

    def _make(self, places: range) -> Batch | None:
        """Make some of the samples; the batch too if they were the last."""
        skipped = []
        for place in places:
            self._samples[place], replaced = self._maker.sample(self._part, place)
            skipped += replaced
        with self._lock:
            self._skipped += skipped
            self._left -= len(places)
            if self._left:
                return None
        return self._maker.collate(self._part, [sample for sample in self._samples if sample is not None])


class Processes:
    """Processes that make a micro-batch each, by torch's DataLoader.

    They are started by a fork server: a fork of a process that has threads or a GPU open may hang, and a fresh start of
    each would load torch again every time.
    """

    def __init__(self, maker: BatchMaker, number: int) -> None:
        self._maker, self._number = maker, number

    def made(self, parts: Iterable[StepPlan], ahead: int) -> Iterator[Made]:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__, *self._modules()])
        _start_fork_server()
        loader = DataLoader(
            _Parts(self._maker, with_cpu=measures_cpu()),
            batch_size=None,  # items are batches already
            sampler=parts,
            num_workers=self._number,
            prefetch_factor=math.ceil((ahead + 1) / self._number),
            worker_init_fn=_start_worker,
            multiprocessing_context=context,
            generator=torch.Generator(),  # else it would draw from the global one, which dropout draws from too
        )
        batches = iter(loader)
        try:
            for made in batches:
                if isinstance(made, ValueError | OSError | RuntimeError):
                    raise made
                yield made
        finally:
            del batches  # its finaliser ends the processes

    def _modules(self) -> list[str]:
        """Modules that the pipelines work with: the fork server loads them once for all processes."""
        pipelines = [each for by_set in self._maker.pipelines.values() for each in by_set.values()]
        return sorted(set[str]().union(*(each.transform.modules() for each in pipelines)) - {"__main__"})


class _Parts(Dataset[Made | Exception]):
    """Micro-batches by their plan, as a worker process makes them."""

    def __init__(self, maker: BatchMaker, *, with_cpu: bool) -> None:
        self._maker, self._with_cpu = maker, with_cpu

    def __getitem__(self, part: StepPlan) -> Made | Exception:
        if self._with_cpu:
            measure_cpu()
        before = spent()
        try:
            batch, skipped = self._maker.make(part)
        except (ValueError, OSError, RuntimeError) as error:
            return error  # raised by the consumer: torch would wrap it into another message
        return Made(batch, skipped, {name: now - before[name] for name, now in spent().items()})


def _start_worker(number: int) -> None:
    # Ctrl-C reaches the whole process group; the training process decides what happens then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    """End this process when its training process has ended, however that was: torch looks at the parent, which is the
    fork server here, and the fork server lives as long as its workers."""
    wait([sentinel])
    os._exit(1)


def _start_fork_server() -> None:
    """Start the server whose children the workers will be, deaf to the signals that ask a training process to stop.

    Launchers and schedulers send them to every process below them. Without its workers a training process could not
    finish its step. A mask is inherited, and nothing that arrives here meanwhile is lost.
    """
    # First, because starting it unblocks signals that this thread has blocked.
    resource_tracker.ensure_running()
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1))
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))
