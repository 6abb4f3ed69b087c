"""Copies of remote files on a local disk, within a bound, shared by all processes of a host.

    FOLDER/visft-cache-1/SHA256.whole          a whole file
                         SHA256/OFFSET-SIZE    a part of one
                         SHA256.part           a whole file on its way
                         SHA256.lock           held by whoever fetches that file
                         lock, total           held while `total`, the bytes of all copies, is changed; that number

Copies are named after the content that the manifest promises, so a changed data set never meets old ones. They get
their final name when they are complete. Removing a copy takes nothing from those who have it open, and the bound is
counted before bytes are written: a process that dies may leave the number too high (it is counted anew when it
matters), never too low.

Locks are those of `flock`: a dead process holds none, once its forked children have closed what they inherited, which
they do at once. (POSIX record locks belong to processes: the kernel reports deadlocks between threads that have none.)
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from visft_ds.data.store import CacheOptions, Expected, StoreFailed, file_digest, pread_all

#: Where copies must go, a tenth of the room goes with them, so that the folder is not searched for each new one.
_SPARE = 10
#: Seconds between looks at a cache that is full of files on their way.
_PAUSE = 0.05

#: Lock files that are open in this process.
_locks: set[int] = set()

_DIGEST = re.compile(r"[0-9a-f]{64}")


class DiskCache:
    """The copies in one folder, for the threads of one process.

    Raises ValueError if the folder cannot be used.
    """

    def __init__(self, options: CacheOptions) -> None:
        self.max_bytes = options.max_bytes
        self._root = options.folder / "visft-cache-1"
        self._closed = threading.Event()
        try:
            self._root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"cannot use {options.folder} as a cache folder: {error}") from error

    def close(self) -> None:
        """Let nobody wait for room any more."""
        self._closed.set()

    def has(self, expected: Expected) -> bool:
        """Return True if the whole file is cached."""
        return self._whole(expected).is_file()

    def has_part(self, expected: Expected, offset: int, size: int) -> bool:
        """Return True if a part is cached, by itself or in the whole file."""
        return self._part(expected, offset, size).is_file() or self.has(expected)

    def read(self, expected: Expected, offset: int, size: int) -> bytes | None:
        """A part, if it is here by itself or in the whole file."""
        data = self._read(self._part(expected, offset, size), 0, size, size)
        return data if data is not None else self._read(self._whole(expected), offset, size, expected.bytes)

    def read_whole(self, expected: Expected, offset: int, size: int, fetch: Callable[[Path], None], what: str) -> bytes:
        """A part of a file of which the whole is here afterwards; the rest as in `open`."""
        with self.open(expected, fetch, what) as file:
            return pread_all(file.fileno(), size, offset)

    def open(self, expected: Expected, fetch: Callable[[Path], None], what: str) -> BinaryIO:
        """The whole file; `fetch(path)` writes it where it is not here. Of many processes one fetches, the rest wait.

        `what` says in messages which file it is. It stays readable, should another process make room just now.

        Raises:
            ValueError: it is larger than the cache, or not what the manifest says.
        """
        descriptor = self._open(self._whole(expected), expected.bytes)
        return os.fdopen(self._fetch(expected, fetch, what) if descriptor is None else descriptor, "rb")

    def put(self, expected: Expected, parts: Sequence[tuple[int, bytes]]) -> None:
        """Keep parts, given as (offset, bytes)."""
        with self._room(sum(len(data) for _, data in parts)), _disk_errors(self._root):
            folder = self._root / expected.sha256
            folder.mkdir(exist_ok=True)
            # One name, written while the lock is held: the next writer overwrites what a dead one left.
            temporary = self._root / "range.part"
            for offset, data in parts:
                temporary.write_bytes(data)
                os.replace(temporary, self._part(expected, offset, len(data)))

    def drop(self, expected: Expected, offset: int, size: int) -> None:
        """Remove all copies that contain a part."""
        with self._lock("lock"):
            total = self._total()
            for path in (self._part(expected, offset, size), self._whole(expected)):
                total -= _remove(path)
            self._set_total(max(0, total))

    def _whole(self, expected: Expected) -> Path:
        assert _DIGEST.fullmatch(expected.sha256)
        return self._root / f"{expected.sha256}.whole"

    def _part(self, expected: Expected, offset: int, size: int) -> Path:
        return self._root / expected.sha256 / f"{offset}-{size}"

    def _read(self, path: Path, offset: int, size: int, whole_size: int) -> bytes | None:
        descriptor = self._open(path, whole_size)
        if descriptor is None:
            return None
        try:
            return pread_all(descriptor, size, offset)
        finally:
            os.close(descriptor)

    def _open(self, path: Path, size: int) -> int | None:
        """A descriptor of a copy, which is marked as used; None if there is none of that size."""
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        if os.fstat(descriptor).st_size == size:
            os.utime(descriptor)  # the access time of files is often not kept
            return descriptor
        os.close(descriptor)
        return None

    def _fetch(self, expected: Expected, fetch: Callable[[Path], None], what: str) -> int:
        """Fetch a whole file unless another one did meanwhile; returns it opened."""
        final, temporary = self._whole(expected), self._root / f"{expected.sha256}.part"
        with self._lock(f"{expected.sha256}.lock"):
            descriptor = self._open(final, expected.bytes)
            if descriptor is not None:
                return descriptor
            temporary.unlink(missing_ok=True)  # of one who died
            with self._room(expected.bytes), _disk_errors(self._root):
                with open(temporary, "wb") as file:
                    file.truncate(expected.bytes)  # whoever counts the folder sees all of what is to come
            try:
                found = None
                for _ in range(2):  # a copy may be damaged on its way
                    with _disk_errors(self._root):
                        fetch(temporary)
                    with open(temporary, "rb") as file:
                        found = Expected(os.fstat(file.fileno()).st_size, file_digest(file))
                    if found == expected:
                        break
                else:
                    assert found is not None
                    raise ValueError(
                        f"{what} has {found.bytes} bytes with sha256 {found.sha256}, not "
                        f"{expected.bytes} with {expected.sha256} as the manifest says: it was changed or badly copied "
                        "after the shards were made. Copy manifest, index and shards there again, together"
                    )
                descriptor = os.open(temporary, os.O_RDONLY)
                with self._lock("lock"):  # whoever counts sees it under one of the names, and under one only
                    os.replace(temporary, final)
                return descriptor
            finally:
                temporary.unlink(missing_ok=True)

    @contextmanager
    def _room(self, size: int) -> Iterator[None]:
        """Hold the lock of the folder with room for `size` bytes, which are counted as used."""
        if size > self.max_bytes:
            raise ValueError(f"{size} bytes do not fit into a cache of {self.max_bytes}: give the cache more room")
        while True:
            with self._lock("lock"):
                total = self._total()
                if total + size > self.max_bytes:
                    total = self._evict(min(self.max_bytes - size, self.max_bytes - self.max_bytes // _SPARE))
                if total + size <= self.max_bytes:
                    self._set_total(total + size)
                    yield
                    return
            # Full of files on their way, which may not be taken from those who write them.
            if self._closed.wait(_PAUSE):
                raise RuntimeError(f"{self._root}: waiting for room was stopped, because the store was closed")

    def _evict(self, goal: int) -> int:
        """Remove what was not used for longest until `goal` bytes are left; returns how many are."""
        copies = sorted(_copies(self._root))
        total = sum(size for _, size, _ in copies)
        for _, _, path in copies:
            if total <= goal:
                break
            if path.endswith(".part"):
                lock = f"{os.path.basename(path).removesuffix('.part')}.lock"
                with self._lock(lock, wait=False) as abandoned:
                    total -= _remove(Path(path)) if abandoned else 0
            else:
                total -= _remove(Path(path))
        return total

    def _total(self) -> int:
        try:
            data = (self._root / "total").read_bytes()
        except FileNotFoundError:
            data = b""
        return int(data) if data.isdigit() else sum(size for _, size, _ in _copies(self._root))

    def _set_total(self, total: int) -> None:
        with _disk_errors(self._root):
            (self._root / "total").write_bytes(b"%d" % total)

    @contextmanager
    def _lock(self, name: str, *, wait: bool = True) -> Iterator[bool]:
        """Hold a lock against all threads and processes; without `wait`, yields False where another one holds it."""
        descriptor = os.open(self._root / name, os.O_RDWR | os.O_CREAT, 0o666)
        _locks.add(descriptor)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
            else:
                yield True
        finally:
            _locks.discard(descriptor)
            os.close(descriptor)


def _close_locks_of_parent() -> None:
    for descriptor in _locks:
        os.close(descriptor)
    _locks.clear()


os.register_at_fork(after_in_child=_close_locks_of_parent)


def _copies(root: Path) -> Iterator[tuple[int, int, str]]:
    """(last use, bytes, path) of every copy; other files in the folder are none of ours."""
    for entry in os.scandir(root):
        stem, _, suffix = entry.name.partition(".")
        if not _DIGEST.fullmatch(stem):
            continue
        files = os.scandir(entry) if entry.is_dir() else [entry] if suffix in ("whole", "part") else []
        for file in files:
            try:
                status = file.stat()
            except FileNotFoundError:  # given up by whoever fetched it
                continue
            yield status.st_mtime_ns, status.st_size, file.path


def _remove(path: Path) -> int:
    """Remove a file; returns its size, 0 if it is not there."""
    try:
        size = path.stat().st_size
        path.unlink()
    except FileNotFoundError:
        return 0
    return size


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """Say that it is the cache where its disk is full or cannot be written."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise StoreFailed(f"cannot write to the cache in {folder}: {error}; free some room") from error
        raise
