"""Whole copies of remote files on a local disk, within a bound, shared by all processes of a machine.

    FOLDER/visft-cache-2/SHA256.whole          a copy
                         SHA256.part           the copy on its way
                         lock                  held by whoever makes a copy: one at a time

Copies are named after the content that the manifest promises, so a changed data set never meets old ones. They get
their final name when they are complete. Removing one takes nothing from those who have it open. A dead process holds no
lock, and what it left of a copy is removed with the next one.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import BinaryIO

from filelock import FileLock, Timeout

from visft_ds.data.store import CacheOptions, Expected, Stopped, file_digest, pread_all
from visft_ds.resilience.errors import StoreFailed

#: Seconds between looks at a lock: of readers that need a copy, and, not to be before them, of copies to come.
_PAUSE, _LONG_PAUSE = 0.05, 0.5

_log = logging.getLogger(__name__)


class DiskCache:
    """The copies in one folder, for the threads of one process.

    Those used since it was opened are not given up for others of the same run: in a random order one shard is worth as
    much as another, and shards that take turns would be fetched many times an epoch.

    Args:
        options: the folder and its bound.
        where: URL of the files, for messages.
        expected: size and digest of every file by its name.
        fetch: writes a file of a given name to a given path.
    """

    def __init__(
        self, options: CacheOptions, where: str, expected: Mapping[str, Expected], fetch: Callable[[str, str], None]
    ) -> None:
        self._root = options.folder / "visft-cache-2"
        self._max_bytes, self._where, self._expected, self._fetch = options.max_bytes, where, expected, fetch
        self._opened = time.time()
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._touched: set[str] = set()
        self._queue: deque[str] = deque()  #: of those touched, what is to be copied
        self._thread: threading.Thread | None = None
        self._before: int | None = None  #: reads to come before the first copy; None: no hint has said it
        self._failed: StoreFailed | None = None
        try:
            self._root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"cannot use {options.folder} as a cache folder: {error}") from error

    def touch(self, name: str) -> bool:
        """Return True if there is a copy; else one is made in the background.

        Raises:
            StoreFailed: the server, or the disk, failed at an earlier one.
        """
        if (self._root / f"{self._expected[name].sha256}.whole").is_file():
            return True
        if self._failed is not None:
            raise self._failed
        with self._lock:
            if name not in self._touched:
                self._touched.add(name)
                self._queue.append(name)
                self._begin()
        return False

    def begin_after(self, reads: int) -> None:
        """Begin copies in the background only after so many reads; the first call counts."""
        if self._before is None:
            self._before = reads

    def count_read(self) -> None:
        """Count a read; those that `begin_after` waits for begin the copies."""
        if self._before:
            with self._lock:
                self._before -= 1
                self._begin()

    def read(self, name: str, offset: int, size: int) -> bytes | None:
        """A part of a file; None if there is no copy."""
        file = self._open(name)
        if file is None:
            return None
        with file:
            return pread_all(file.fileno(), size, offset)

    def open(self, name: str) -> BinaryIO:
        """A copy, made now if there is none, also in the place of those in use.

        Raises:
            ValueError: the file is not what the manifest says.
        """
        while (file := self._open(name)) is None:
            self._copy(name, at_any_cost=True)
        return file

    def drop(self, name: str) -> None:
        """Remove a copy that proved to be damaged."""
        with suppress(FileNotFoundError):
            (self._root / f"{self._expected[name].sha256}.whole").unlink()
            self._touched.discard(name)

    def close(self) -> None:
        """End the copies; call it when fetching was stopped."""
        self._closed.set()
        with self._lock:
            thread = self._thread
        if thread is not None:
            thread.join()

    def _begin(self) -> None:
        """Begin to copy what was touched; the lock is held."""
        if not self._before and self._queue and self._thread is None:
            # A daemon: the end of the program does not wait for it, and a copy that was cut off is none.
            self._thread = threading.Thread(target=self._copy_all, name="copies", daemon=True)
            self._thread.start()

    def _open(self, name: str) -> BinaryIO | None:
        """A copy, which is marked as used; None if there is none of the right size."""
        expected = self._expected[name]
        try:
            file = (self._root / f"{expected.sha256}.whole").open("rb", buffering=0)
        except FileNotFoundError:
            return None
        if os.fstat(file.fileno()).st_size == expected.bytes:
            os.utime(file.fileno())  # the access time of files is often not kept
            return file
        file.close()
        self.drop(name)
        return None

    def _copy_all(self) -> None:
        """Make the copies of what was touched."""
        while True:
            with self._lock:
                if not self._queue or self._closed.is_set():
                    self._thread = None
                    return
                name = self._queue.popleft()
            try:
                if not self._copy(name, at_any_cost=False):
                    _log.warning("cache full of what this run reads: the rest of %s is not copied", self._where)
                    self._touched.update(self._expected)
                    self._queue.clear()
            except ValueError as error:  # its samples are checked one by one, and good ones can be used
                _log.warning("%s; there will be no copy", error)
            except StoreFailed as error:
                self._failed = error
            except Stopped:
                continue

    def _copy(self, name: str, *, at_any_cost: bool) -> bool:
        """Make a copy unless there is one; False where it would take the room of copies in use."""
        expected = self._expected[name]
        part, final = (self._root / f"{expected.sha256}.{suffix}" for suffix in ("part", "whole"))
        while not final.is_file():
            if self._closed.is_set():
                raise Stopped(f"{self._where}/{name}: copying was stopped, because the store was closed")
            try:
                with FileLock(self._root / "lock", timeout=0):
                    if final.is_file():
                        break
                    if not self._make_room(expected.bytes, at_any_cost):
                        return False
                    for attempt in range(2):  # a copy may be damaged on its way
                        self._fetch(name, str(part))
                        with open(part, "rb") as file:
                            found = Expected(os.fstat(file.fileno()).st_size, file_digest(file))
                        if found == expected:
                            part.replace(final)
                            break
                        part.unlink()
                        if attempt:
                            raise ValueError(
                                f"{self._where}/{name} has {found.bytes} bytes with sha256 {found.sha256}, not "
                                f"{expected.bytes} with {expected.sha256} as the manifest says: it was changed or "
                                "badly copied after the shards were made. Copy manifest, index and shards there "
                                "again, together"
                            )
            except Timeout:
                self._closed.wait(_PAUSE if at_any_cost else _LONG_PAUSE)
            except OSError as error:
                raise StoreFailed(f"cannot write to the cache in {self._root}: {error}; free some room") from error
        return True

    def _make_room(self, size: int, at_any_cost: bool) -> bool:
        """Remove what was not used for longest until a copy fits; False if that was not enough. The lock is held."""
        copies = []
        for entry in os.scandir(self._root):
            with suppress(FileNotFoundError):  # dropped meanwhile
                if entry.name.endswith(".part"):  # of one who died
                    os.unlink(entry)
                elif entry.name.endswith(".whole"):
                    copies.append((entry.stat().st_mtime, entry.stat().st_size, entry.path))
        excess = sum(bytes for _, bytes, _ in copies) + size - self._max_bytes
        for used, bytes, path in sorted(copies):
            if excess > 0 and (at_any_cost or used < self._opened):
                with suppress(FileNotFoundError):
                    os.unlink(path)
                excess -= bytes
        return excess <= 0
