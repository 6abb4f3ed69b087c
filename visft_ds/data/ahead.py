"""Fetching in the background what is about to be read: neighbours by one request, never more than a bound."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from visft_ds.data.store import Part

#: Hints may be read in another order than they came, but not by more than this: threads work on a few steps at a time.
_SLACK = 2


def coalesce(parts: Sequence[Part], *, max_gap: int, max_bytes: int) -> list[list[Part]]:
    """Groups of parts to be fetched by one request each, in the order in which their first parts are needed.

    Parts of one file go together if the bytes that nobody asked for between them are at most `max_gap`, or no more than
    the next part itself, and the request stays within `max_bytes`. A part that is given twice appears once.
    """
    turn = {part: place for place, part in reversed(list(enumerate(parts)))}
    groups: list[list[Part]] = []
    end = 0
    for part in sorted(turn):
        name, offset, size = part
        last = groups[-1] if groups else None
        near = last is not None and last[0][0] == name and offset - end <= max(max_gap, size)
        if last is not None and near and max(end, offset + size) - last[0][1] <= max_bytes:
            last.append(part)
            end = max(end, offset + size)
        else:
            groups.append([part])
            end = offset + size
    return sorted(groups, key=lambda group: min(turn[part] for part in group))


class Ahead:
    """Read-ahead of parts that were hinted and not yet taken.

    Args:
        limit: bytes of parts that may be under way or waiting to be taken.
        fetch: gets the bytes of a group of parts of one file, or puts them where they are found (then None for each).
        threads: groups that are fetched at the same time.
    """

    def __init__(
        self, limit: int, fetch: Callable[[Sequence[Part]], Sequence[bytes] | Sequence[None]], threads: int
    ) -> None:
        self._limit, self._fetch = limit, fetch
        self._pool, self._idle = ThreadPoolExecutor(threads, "ahead"), threads
        self._lock = threading.Lock()
        self._queue: deque[list[Part]] = deque()
        self._queued: dict[Part, int] = {}  #: the number of the hint it was in
        self._held: OrderedDict[Part, tuple[int, Future[bytes | None]]] = OrderedDict()
        self._bytes = 0
        self._hints = 0  #: how many there were
        self._reached = 0  #: the last one of which something was taken
        self._closed = False

    def will_need(self, groups: Sequence[Sequence[Part]]) -> None:
        """Fetch these groups as soon as there is room; returns at once."""
        with self._lock:
            self._hints += 1
            for group in groups:
                new = [part for part in group if part not in self._held and part not in self._queued]
                if new:
                    self._queue.append(new)
                    self._queued.update(dict.fromkeys(new, self._hints))
            self._start()

    def take(self, part: Part) -> Future[bytes | None] | None:
        """The bytes of a part that is under way or here, once; None if it is neither."""
        with self._lock:
            hint, future = self._held.pop(part, (0, None))
            if future is None:
                hint = self._queued.pop(part, 0)  # its reader was faster
            else:
                self._bytes -= part[2]
            if hint > self._reached:
                self._reached = hint
                self._drop_abandoned()
            self._start()
            return future

    def stop(self) -> None:
        """Forget everything; nobody waits any more. What is under way must be stopped by its source."""
        with self._lock:
            self._closed = True
            self._queue.clear()
            self._queued.clear()
            for _, future in self._held.values():
                future.cancel()
            self._held.clear()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def join(self) -> None:
        """Wait for the threads to end."""
        self._pool.shutdown(wait=True)

    def _drop_abandoned(self) -> None:
        """Give up what was hinted long before what is read now: a loop that was left will never take it."""
        last = self._reached - _SLACK
        for part in [part for part, hint in self._queued.items() if hint < last]:
            del self._queued[part]
        for part, future in [(part, future) for part, (hint, future) in self._held.items() if hint < last]:
            if future.done():
                del self._held[part]
                self._bytes -= part[2]

    def _start(self) -> None:
        """Start the groups for which there is room, in order; the lock is held."""
        # No more than can run: at the end of the program a pool works off everything it was given.
        while self._queue and not self._closed and self._idle:
            group = [part for part in self._queue[0] if part in self._queued]
            size = sum(part[2] for part in group)
            if self._bytes + size > self._limit and self._held:
                return
            self._queue.popleft()
            hints = [self._queued.pop(part) for part in group]
            if group and size <= self._limit:  # a group that never fits is read when it is needed
                futures: list[Future[bytes | None]] = [Future() for _ in group]
                self._held.update(zip(group, zip(hints, futures, strict=True), strict=True))
                self._bytes += size
                self._idle -= 1
                self._pool.submit(self._run, group, futures)

    def _run(self, group: list[Part], futures: list[Future[bytes | None]]) -> None:
        try:
            results = self._fetch(group)
        except BaseException as error:
            with self._lock:
                for future in futures:
                    if not future.cancelled():
                        future.set_exception(error)  # raised where the part is read, if it is
                self._idle += 1
                self._start()
            raise
        with self._lock:
            for future, data in zip(futures, results, strict=True):
                if not future.cancelled():
                    future.set_result(data)
            self._idle += 1
            self._start()
