"""A remote folder as a `Store`: requests, copies on a local disk and reading ahead put together.

Without a cache folder every part is read by a request, and what was hinted waits in memory to be read once. With one,
in mode "ranges" each part that was read is kept on disk; in mode "shards" the first touch of a shard copies all of it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import CancelledError
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from visft_ds.data.ahead import Ahead, coalesce
from visft_ds.data.cache import DiskCache
from visft_ds.data.remote import Transport, check_installed
from visft_ds.data.store import CacheOptions, Expected, Part

#: Bytes read ahead into memory where there is no cache folder.
MEMORY_BYTES = 256 << 20
#: The largest request. Whole shards come in pieces of this size, so that a failure costs no more than one of them.
REQUEST_BYTES = 16 << 20
#: Unwanted bytes between two parts that are fetched along rather than paid for by a second request.
MAX_GAP = 64 << 10
#: Requests that read ahead at the same time; shards that do.
_AHEAD_REQUESTS = 8
_AHEAD_SHARDS = 2


class RemoteStore:
    """Files below a URL; see `visft_ds.data.store.Store`.

    Raises:
        ValueError: a URL with a query or a password, or the package for its protocol is not installed.
    """

    def __init__(self, url: str, protocol: str, cache: CacheOptions | None) -> None:
        check_installed(protocol)
        if "?" in url or "#" in url:
            raise ValueError(f"{url}: give the URL of a folder, without '?' and '#'")
        if protocol.startswith("http") and "@" in urlsplit(url).netloc:
            raise ValueError(
                "a URL with a password would be printed and stored with every run: give it without, and the header in "
                'the environment variable FSSPEC_HTTP, as {"headers": {"Authorization": "..."}}'
            )
        self._url, self._protocol, self._cache = url.rstrip("/"), protocol, cache
        self._expected: dict[str, Expected] = {}
        #: By process: what a forked child finds here of its parent it must neither use nor drop.
        self._processes: dict[int, _Process] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_processes": {}}

    @property
    def where(self) -> str:
        """The URL."""
        return self._url

    def expect(self, files: Mapping[str, Expected]) -> None:
        """See `Store.expect`."""
        if self._cache is not None:
            for name, file in files.items():
                if file.bytes > self._cache.max_bytes:
                    raise ValueError(
                        f"{name} has {file.bytes} bytes, a cache of {self._cache.max_bytes} bytes cannot hold it: give "
                        "the cache more room (several times the size of a shard), or make smaller shards"
                    )
        self._expected.update(files)

    def read(self, name: str, offset: int, size: int) -> bytes:
        """See `Store.read`."""
        process, expected = self._process(), self._expected.get(name)
        if expected is None:
            return process.transport.fetch(name, offset, size)
        size = max(0, min(size, expected.bytes - offset))
        if process.cache is not None and process.options.mode == "shards":
            process.taken(_whole(name, expected))
            return process.cache.read_whole(expected, offset, size, *process.source(name))
        data = process.taken((name, offset, size))
        if data is None and process.cache is not None:
            data = process.cache.read(expected, offset, size)
        if data is None:
            data = process.transport.fetch(name, offset, size, exact=True)
            if process.cache is not None:
                process.cache.put(expected, [(offset, data)])
        return data

    def load(self, name: str) -> bytes:
        """See `Store.load`."""
        return self._process().transport.fetch_all(name)

    def sizes(self, names: Collection[str] | None = None) -> dict[str, int]:
        """See `Store.sizes`."""
        return self._process().transport.sizes(names)

    def will_need(self, parts: Sequence[Part]) -> None:
        """See `Store.will_need`."""
        process = self._process()
        known = [part for part in parts if part[0] in self._expected]
        if process.cache is not None and process.options.mode == "shards":
            files = {name: self._expected[name] for name, _, _ in known}
            wanted = [[_whole(name, file)] for name, file in files.items() if not process.cache.has(file)]
            process.ahead.will_need(wanted)
            return
        if process.cache is not None:  # what is here already must not wait behind what is not
            has = process.cache.has_part
            known = [part for part in known if not has(self._expected[part[0]], part[1], part[2])]
        process.ahead.will_need(coalesce(known, max_gap=MAX_GAP, max_bytes=process.group_bytes))

    def passed(self, parts: Sequence[Part]) -> None:
        """See `Store.passed`."""
        process = self._process()
        if process.cache is not None and process.options.mode == "shards":
            parts = [_whole(name, self._expected[name]) for name in {name for name, _, _ in parts}]
        for part in parts:
            process.ahead.take(part)

    def forget(self, name: str, offset: int, size: int) -> bool:
        """See `Store.forget`; True also without copies: bytes may be damaged on their way."""
        process, expected = self._process(), self._expected.get(name)
        if process.cache is not None and expected is not None:
            process.cache.drop(expected, offset, size)
        return True

    def open(self, name: str) -> BinaryIO | None:
        """See `Store.open`; None without a cache."""
        process, expected = self._process(), self._expected.get(name)
        if process.cache is None or expected is None:
            return None
        return process.cache.open(expected, *process.source(name))

    def another(self) -> RemoteStore:
        """See `Store.another`."""
        store = RemoteStore(self._url, self._protocol, self._cache)
        store._expected = dict(self._expected)
        return store

    def close(self) -> None:
        """See `Store.close`."""
        process = self._processes.pop(os.getpid(), None)
        if process is not None:
            process.close()

    def _process(self) -> _Process:
        # No lock, which a fork could leave held for ever: making one too many costs nothing, since it opens nothing.
        return self._processes.get(os.getpid()) or self._processes.setdefault(
            os.getpid(), _Process(Transport(self._url, self._protocol), self._cache, self._expected)
        )


class _Process:
    """Transport, cache and read-ahead of a store in one process."""

    def __init__(self, transport: Transport, options: CacheOptions | None, expected: Mapping[str, Expected]) -> None:
        self.transport = transport
        self.cache = None if options is None else DiskCache(options)
        self._options = options
        self._expected = expected
        self.ahead = self._make_ahead()  # its threads begin with the first hint

    @property
    def options(self) -> CacheOptions:
        """Those of the cache, where there is one."""
        assert self._options is not None
        return self._options

    def _make_ahead(self) -> Ahead:
        if self.cache is None:
            return Ahead(MEMORY_BYTES, self._into_memory, _AHEAD_REQUESTS)
        if self.options.mode == "ranges":
            return Ahead(self.options.max_bytes // 4, self._onto_disk, _AHEAD_REQUESTS)
        # What is read now must keep its place beside what is read next.
        return Ahead(self.options.max_bytes // 2, self._whole_files, _AHEAD_SHARDS)

    @property
    def group_bytes(self) -> int:
        """The largest request that reads ahead: several must fit into the room there is."""
        room = MEMORY_BYTES if self.cache is None else self.options.max_bytes // 4
        return min(REQUEST_BYTES, room // 4)

    def taken(self, part: Part) -> bytes | None:
        """Bytes of a part read ahead; None if it was not, or if it lies in the cache. Raises the reader's error."""
        future = self.ahead.take(part)
        try:
            return None if future is None else future.result()
        except CancelledError as error:
            raise RuntimeError(
                f"{self.transport.address(part[0])}: reading was stopped, the store was closed"
            ) from error

    def source(self, name: str) -> tuple[Callable[[Path], None], str]:
        """Function that fetches a whole file, and the file's name in messages."""
        return partial(self._copy, name, self._expected[name]), self.transport.address(name)

    def _copy(self, name: str, expected: Expected, target: Path) -> None:
        """Write a whole file to `target`, which has its size already."""
        with open(target, "r+b") as file:
            for offset in range(0, expected.bytes, REQUEST_BYTES):
                if self.transport.ignores_ranges:
                    break
                size = min(REQUEST_BYTES, expected.bytes - offset)
                try:
                    file.write(self.transport.fetch(name, offset, size, exact=True))
                except ValueError:
                    if not self.transport.ignores_ranges:
                        raise
            if self.transport.ignores_ranges:
                self.transport.copy(name, file)

    def close(self) -> None:
        """End all requests and threads."""
        self.ahead.stop()
        if self.cache is not None:
            self.cache.close()
        self.transport.close()
        self.ahead.join()

    def _into_memory(self, group: Sequence[Part]) -> list[bytes]:
        name, first, _ = group[0]
        end = max(offset + size for _, offset, size in group)
        data = self.transport.fetch(name, first, end - first, exact=True)
        return [data[offset - first : offset - first + size] for _, offset, size in group]

    def _onto_disk(self, group: Sequence[Part]) -> list[None]:
        assert self.cache is not None
        expected = self._expected[group[0][0]]
        missing = [part for part in group if not self.cache.has_part(expected, part[1], part[2])]
        for wanted in coalesce(missing, max_gap=MAX_GAP, max_bytes=REQUEST_BYTES):
            fetched = self._into_memory(wanted)
            self.cache.put(expected, [(part[1], data) for part, data in zip(wanted, fetched, strict=True)])
        return [None] * len(group)

    def _whole_files(self, group: Sequence[Part]) -> list[None]:
        assert self.cache is not None
        name = group[0][0]
        self.cache.open(self._expected[name], *self.source(name)).close()
        return [None]


def _whole(name: str, file: Expected) -> Part:
    """The part that stands for a whole shard."""
    return name, 0, file.bytes
