"""Worker threads of a conversion.

Threads, not processes: reading, decoding and hashing release the interpreter lock, and threads share the labels. Images
are the unit of work, not shards: a split of four shards keeps sixteen cores busy. A few more threads only write
the shards from prepared images.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from types import TracebackType
from typing import TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")
_INTERVAL = 0.25  # seconds between two reports of progress
#: Shards in the making at the same time. Writing and hashing takes a tenth of the time of checking.
_WRITERS = 4
#: Images that are made ready ahead of each writer, for each thread.
_AHEAD = 2


@dataclass
class BuildProgress:
    """Progress of a build: its phase, and images and shards that are done."""

    phase: str = "reading annotations"  #: then "writing shards"
    images: int = 0
    shards: int = 0
    kept: int = 0  #: shards that were there already
    total_images: int = 0
    total_shards: int = 0


class BuildWorkers:
    """A number of threads for images, a few for shards, and what they have done. Use as a context manager."""

    def __init__(self, count: int, on_progress: Callable[[BuildProgress], None]) -> None:
        self.progress = BuildProgress()
        self.lock = threading.Lock()  #: for whoever changes `progress`
        self._on_progress = on_progress
        self._stop = threading.Event()
        self._ahead = _AHEAD * count
        self._images = ThreadPoolExecutor(count, "images")
        self._writers = ThreadPoolExecutor(min(count, _WRITERS), "shards")

    def __enter__(self) -> BuildWorkers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for pool in (self._writers, self._images):
            pool.shutdown(wait=True, cancel_futures=True)

    def run(self, work: Callable[[Job], Result], jobs: Sequence[Job]) -> list[Result]:
        """Run the large jobs, each in a thread; returns the results in order. Raises the first error."""
        self._on_progress(self.progress)
        futures = [self._writers.submit(work, job) for job in jobs]
        pending: set[Future[Result]] = set(futures)
        while pending:
            done, pending = wait(pending, timeout=_INTERVAL, return_when=FIRST_EXCEPTION)
            self._on_progress(self.progress)
            for future in done:
                future.result()
        return [future.result() for future in futures]

    def ahead(self, work: Callable[[Job], Result], jobs: Iterable[Job]) -> Iterator[Result]:
        """Yield the results of small jobs in order, a bounded number ahead. Raises RuntimeError if stopped."""
        waiting: deque[Future[Result]] = deque()
        for job in jobs:
            if self._stop.is_set():
                raise RuntimeError("stopped because another shard failed or the build was interrupted")
            waiting.append(self._images.submit(work, job))
            if len(waiting) > self._ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def count(self) -> None:
        """Note that an image is done."""
        with self.lock:
            self.progress.images += 1
