"""Shards on web servers and in object stores, through fsspec.

fsspec knows the protocols, the credentials and the connections; its own configuration (environment variables
`FSSPEC_<PROTOCOL>_<OPTION>`, files in `~/.config/fsspec`) applies. What it leaves open is done here: that a range is
really the range that was asked for, which failures are worth another attempt, and that a forked process never touches
the event loop and the sockets of its parent.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import errno
import importlib.util
import logging
import os
import random
import sys
import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO, NamedTuple, TypeVar

import fsspec
import fsspec.asyn
from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper
from fsspec.utils import merge_offset_ranges

from visft_ds.data.cache import DiskCache
from visft_ds.data.store import REMOTE_PROTOCOLS, CacheOptions, Expected, Part, Stopped, pread_all
from visft_ds.redaction import redacted, refuse_secrets
from visft_ds.resilience.errors import StoreFailed

#: Attempts at a request in all, and the longest wait before the second of them in seconds; it doubles each time.
ATTEMPTS = 5
FIRST_WAIT = 0.5
#: Seconds in which a web server may say nothing. The packages for object stores have their own.
TIMEOUT = 120.0
#: Connections to a web server, and how many of them may read ahead.
MAX_REQUESTS = 16
AHEAD_REQUESTS = 8
#: Bytes read ahead into memory; the largest request that does.
MEMORY_BYTES = 256 << 20
REQUEST_BYTES = 16 << 20
#: Unwanted bytes between two parts that are fetched along rather than paid for by a second request.
MAX_GAP = 64 << 10
#: Parts of the first hint, at most, that are read before copies begin: those would take the line of the first batch.
FIRST_READS = 64
#: Hints whose parts are kept: they may be read in another order than they came, but not by more.
_HINTS = 3

#: Those of 4xx that may pass.
_TRANSIENT_STATUS = {408, 425, 429}
_PERMANENT_ERRNO = {errno.EINVAL, errno.EPERM, errno.ENAMETOOLONG, errno.EISDIR}
#: What packages raise besides OSError where a request fails: (module, class, worth another attempt).
_FOREIGN_ERRORS = (
    ("aiohttp", "ClientError", True),
    ("aiohttp", "InvalidURL", False),
    ("aiohttp", "ClientSSLError", False),
    ("botocore.exceptions", "BotoCoreError", True),
    ("botocore.exceptions", "ClientError", True),
    ("botocore.exceptions", "NoCredentialsError", False),
    ("botocore.exceptions", "PartialCredentialsError", False),
    ("botocore.exceptions", "ProfileNotFound", False),
    ("botocore.exceptions", "ParamValidationError", False),
    ("gcsfs.retry", "HttpError", True),
    ("httpx", "HTTPError", True),
)

#: File systems in use, by `id`: fsspec takes those of equal options for equal. A forked child keeps its parent's alive
#: through this: to drop them would close sockets and take them out of an epoll instance that both processes share, and
#: the parent would wait for ever.
_in_use: dict[int, Any] = {}

# fsspec forgets its event loop after a fork, but not the lock around making one, which another thread may have held.
os.register_at_fork(after_in_child=fsspec.asyn.reset_lock)

_log = logging.getLogger(__name__)
_Answer = TypeVar("_Answer")


class NoRanges(ValueError):
    """A web server that answers a request for a range with the whole file."""


class _Here(NamedTuple):
    """Connections, reading ahead and copies of a store in one process."""

    requests: Requests
    ahead: Ahead
    cache: DiskCache | None


class RemoteStore:
    """Files below a URL; see `visft_ds.data.store.Store`.

    Without a cache folder every part is read by a request, and what was hinted waits in memory to be read once. With
    one, the first touch of a file has all of it copied in the background; until it is there, parts come by requests.

    Raises:
        ValueError: a URL with a query or a password, or the package for its protocol is not installed.
    """

    def __init__(self, url: str, protocol: str, cache: CacheOptions | None) -> None:
        package = REMOTE_PROTOCOLS[protocol]
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"{protocol}:// needs the package {package}: pip install 'visft_ds[remote]'")
        refuse_secrets(url)
        self.where, self._protocol, self._cache = url.rstrip("/"), protocol, cache
        self._expected: dict[str, Expected] = {}
        #: By process: what a forked child finds here of its parent it must neither use nor drop.
        self._processes: dict[int, _Here] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_processes": {}}

    def expect(self, files: Mapping[str, Expected]) -> None:
        """See `Store.expect`."""
        for name, file in files.items():
            if self._cache is not None and file.bytes > self._cache.max_bytes:
                raise ValueError(
                    f"{name} has {file.bytes} bytes, a cache of {self._cache.max_bytes} bytes cannot hold it: give "
                    "the cache more room (for all shards, if possible), or make smaller shards"
                )
        self._expected.update(files)

    def read(self, name: str, offset: int, size: int) -> bytes:
        """See `Store.read`; only of files that were announced by `expect`."""
        here, size = self._here(), min(size, self._expected[name].bytes - offset)
        if size <= 0:
            return b""
        try:
            data = here.ahead.take((name, offset, size))
            if data is None and here.cache is not None and here.cache.touch(name):
                data = here.cache.read(name, offset, size)
            if data is None:
                data = here.requests.fetch(name, offset, offset + size)
        except NoRanges:
            if here.cache is None:
                raise
            with here.cache.open(name) as file:
                data = pread_all(file.fileno(), size, offset)
        if here.cache is not None:
            here.cache.count_read()
        return data

    def load(self, name: str) -> bytes:
        """See `Store.load`."""
        return self._here().requests.fetch(name)

    def sizes(self, names: Collection[str] | None = None) -> dict[str, int]:
        """See `Store.sizes`."""
        return self._here().requests.sizes(names)

    def will_need(self, parts: Sequence[Part]) -> None:
        """See `Store.will_need`."""
        here = self._here()
        if here.cache is not None:
            here.cache.begin_after(min(len(parts), FIRST_READS))
            copied = {name: here.cache.touch(name) for name in dict.fromkeys(part[0] for part in parts)}
            parts = [part for part in parts if not copied[part[0]]]
        here.ahead.will_need(parts)

    def forget(self, name: str, offset: int, size: int) -> bool:
        """See `Store.forget`; True also without copies: bytes may be damaged on their way."""
        cache = self._here().cache
        if cache is not None:
            cache.drop(name)
        return True

    def open(self, name: str) -> BinaryIO | None:
        """See `Store.open`; None without a cache."""
        cache = self._here().cache
        return None if cache is None else cache.open(name)

    def another(self) -> RemoteStore:
        """See `Store.another`."""
        store = RemoteStore(self.where, self._protocol, self._cache)
        store._expected = dict(self._expected)
        return store

    def close(self) -> None:
        """See `Store.close`."""
        here = self._processes.pop(os.getpid(), None)
        if here is not None:
            here.ahead.close()
            here.requests.close()
            if here.cache is not None:
                here.cache.close()

    def _here(self) -> _Here:
        # No lock, which a fork could leave held for ever: making one too many costs nothing, since it opens nothing.
        found = self._processes.get(os.getpid())
        if found is None:
            requests = Requests(self.where, self._protocol)
            options, files = self._cache, self._expected
            cache = None if options is None else DiskCache(options, self.where, files, requests.copy)
            found = self._processes.setdefault(os.getpid(), _Here(requests, Ahead(requests), cache))
        return found


@dataclass(eq=False)
class _Group:
    """Neighbouring parts of a file that one request fetches."""

    name: str
    start: int
    end: int
    hint: int  #: how many hints there were before
    parts: set[Part]  #: not yet taken
    future: Future[bytes] | None = None


class Ahead:
    """Reading ahead of parts that were hinted and not yet taken, within a bound of memory."""

    def __init__(self, requests: Requests) -> None:
        self._requests = requests
        self._lock = threading.RLock()
        self._hints = 0
        self._of: dict[Part, _Group] = {}
        self._waiting: deque[_Group] = deque()  #: in the order in which they are needed
        self._running = 0
        self._bytes = 0  #: of groups that are under way or here

    def will_need(self, parts: Sequence[Part]) -> None:
        """Fetch these parts, in this order, as soon as there is room."""
        with self._lock:
            self._hints += 1
            # What was hinted long ago belongs to a loop that was left.
            for group in {group for group in self._of.values() if group.hint <= self._hints - _HINTS}:
                self._drop(group)
            for group in grouped([part for part in parts if part not in self._of], self._hints):
                self._waiting.append(group)
                self._of.update(dict.fromkeys(group.parts, group))
            self._begin()

    def take(self, part: Part) -> bytes | None:
        """Bytes of a part that is under way or here, once; None if it is neither."""
        with self._lock:
            group = self._of.get(part)
            if group is None:
                return None
            future = group.future
            group.parts.remove(part)
            del self._of[part]
            if not group.parts:
                self._drop(group)
                self._begin()
        if future is None:  # its reader was faster
            return None
        first = part[1] - group.start
        return _result(future)[first : first + part[2]]

    def close(self) -> None:
        """Begin nothing any more."""
        with self._lock:
            self._waiting.clear()

    def _drop(self, group: _Group) -> None:
        for part in group.parts:
            del self._of[part]
        group.parts.clear()
        if group.future is not None:
            self._bytes -= group.end - group.start

    def _begin(self) -> None:
        """Begin the first groups, as many as there is room for; the lock is held."""
        while self._waiting and self._running < AHEAD_REQUESTS:
            group = self._waiting[0]
            size = group.end - group.start
            if group.parts and self._bytes + size > MEMORY_BYTES:
                return
            self._waiting.popleft()
            if group.parts:
                self._running += 1
                self._bytes += size
                group.future = self._requests.begin(group.name, group.start, group.end)
                group.future.add_done_callback(self._ended)

    def _ended(self, _: Future[bytes]) -> None:
        with self._lock:
            self._running -= 1
            self._begin()


def grouped(parts: Sequence[Part], hint: int = 0) -> list[_Group]:
    """Parts by the requests that fetch them, in the order in which their first parts are needed; each part once."""
    if not parts:
        return []
    turns = {part: turn for turn, part in reversed(list(enumerate(parts)))}
    names, starts, sizes = (list(column) for column in zip(*turns, strict=True))
    ends = [start + size for start, size in zip(starts, sizes, strict=True)]
    # A gap as large as a part is worth it too: ranks that share a window skip each other's samples.
    gap = max(MAX_GAP, sum(sizes) // len(sizes))
    merged = zip(*merge_offset_ranges(names, starts, ends, max_gap=gap, max_block=REQUEST_BYTES), strict=True)
    groups = [_Group(name, start, end, hint, set()) for name, start, end in merged]
    places = [(group.name, group.start) for group in groups]
    for part in turns:
        groups[bisect_right(places, part[:2]) - 1].parts.add(part)
    return sorted(groups, key=lambda group: min(turns[part] for part in group.parts))


class Requests:
    """The files below one URL, for the threads of one process.

    Nothing is opened before the first request.
    """

    def __init__(self, url: str, protocol: str) -> None:
        self._url, self._protocol = url, protocol
        self._ignores_ranges = False  #: True as soon as a server has answered a range with something else
        self._lock = threading.Lock()
        self._filesystem: Any = None
        self._running: set[Future[Any]] = set()
        self._closed = False

    def fetch(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """Bytes [start, end) of a file, or all of it.

        Raises:
            ValueError: there is no such file, it may not be read, or (`NoRanges`) the server cannot give ranges.
            RuntimeError: the last attempt failed too.
        """
        return _result(self.begin(name, start, end))

    def begin(self, name: str, start: int | None = None, end: int | None = None) -> Future[bytes]:
        """As `fetch`, in the background."""
        filesystem = self._open()
        # Without a cache of its own, which would read megabytes ahead of every sample.
        options = {"cache_type": "none"} if isinstance(filesystem, AsyncFileSystemWrapper) else {}

        async def ask() -> bytes:
            if self._ignores_ranges and end is not None:
                raise NoRanges
            data: bytes = await filesystem._cat_file(f"{self._url}/{name}", start=start, end=end, **options)
            if start is not None and end is not None and len(data) != end - start:
                raise ConnectionError(f"{len(data)} bytes came instead of {end - start}")
            return data

        return self._submit(name if end is None else f"{name} [{start}:{end}]", ask)

    def copy(self, name: str, path: str) -> None:
        """Write a file by a single request, for which any web server will do; raises as `fetch`, OSError of a disk."""
        open(path, "wb").close()  # else the disk's refusal would look like the server's
        filesystem = self._open()
        _result(self._submit(name, lambda: filesystem._get_file(f"{self._url}/{name}", path)))

    def sizes(self, names: Collection[str] | None) -> dict[str, int]:
        """Bytes of those of `names` that exist, or of all files; raises ValueError for all files behind http."""
        filesystem = self._open()
        if self._protocol.startswith("http"):
            if names is None:
                raise ValueError(f"{self._url}: files behind {self._protocol}:// cannot be listed; name them")
            asked = {name: partial(_http_size, filesystem, f"{self._url}/{name}") for name in names}
            futures = {name: self._submit(name, ask) for name, ask in asked.items()}
            return {name: size for name, future in futures.items() if (size := _result(future)) is not None}

        async def entries() -> list[dict[str, Any]]:
            try:
                found: list[dict[str, Any]] = await filesystem._ls(self._url, detail=True, refresh=True)
                return found
            except FileNotFoundError:
                return []

        files = [entry for entry in _result(self._submit("", entries)) if entry["type"] == "file"]
        sizes = {entry["name"].rsplit("/", 1)[-1]: int(entry["size"]) for entry in files}
        return {name: size for name, size in sizes.items() if names is None or name in names}

    def close(self) -> None:
        """End what is under way and close all connections. The object cannot be used any more."""
        with self._lock:
            self._closed = True
            running = list(self._running)
            if self._filesystem is not None:
                del _in_use[id(self._filesystem)]
                self._filesystem = None  # its finaliser closes the connections
        for future in running:
            future.cancel()

    def _submit(self, what: str, ask: Callable[[], Awaitable[_Answer]]) -> Future[_Answer]:
        """Make a request on fsspec's event loop, which has a thread of its own; `what` it is, for messages."""

        async def run() -> _Answer:
            return await self._insist(f"{self._url}/{what}", ask)

        future = asyncio.run_coroutine_threadsafe(run(), fsspec.asyn.get_loop())
        with self._lock:
            self._running.add(future)
            if self._closed:
                future.cancel()
        future.add_done_callback(self._running.discard)
        return future

    async def _insist(self, what: str, ask: Callable[[], Awaitable[_Answer]]) -> _Answer:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return await ask()
            except _foreign(True) as error:
                self._refuse_permanent(what, error)
                if attempt == ATTEMPTS:
                    raise StoreFailed(f"{what}: attempt {attempt} of {ATTEMPTS} failed too; {_text(error)}") from error
                # Drawn, so that many processes that failed together do not come back together.
                wait = random.uniform(0.5, 1) * FIRST_WAIT * 2 ** (attempt - 1)
                values = what, _text(error), attempt + 1, ATTEMPTS, wait
                _log.warning("%s: %s; attempt %d of %d follows in %.2f s", *values)
                await asyncio.sleep(wait)
        raise AssertionError("the last attempt returns or raises")

    def _refuse_permanent(self, what: str, error: BaseException) -> None:
        """Raise for a failure that another attempt would only repeat: ValueError, but OSError for a full disk."""
        if isinstance(error, NoRanges):
            self._ignores_ranges = True
            raise NoRanges(
                f"{what}: the server does not answer range requests, so single samples cannot be read from it: copy "
                "the shards into a folder, give a cache (visft.data.cache), or use another server"
            ) from error
        status, number = _status(error), getattr(error, "errno", None)
        if number in (errno.ENOSPC, errno.EDQUOT):
            raise error
        if isinstance(error, FileNotFoundError) or status in (404, 410):
            raise ValueError(f"{what}: there is no such file (or it is hidden). Check the URL") from error
        if isinstance(error, PermissionError) or status in (401, 403):
            raise ValueError(f"{what}: access was denied ({_text(error)}). Check credentials and rights") from error
        wrong = isinstance(error, _foreign(False)) or number in _PERMANENT_ERRNO
        if wrong or (status is not None and 400 <= status < 500 and status not in _TRANSIENT_STATUS):
            raise ValueError(f"{what}: {_text(error)}") from error

    def _open(self) -> Any:
        with self._lock:
            if self._closed:
                raise Stopped(f"{self._url}: reading was stopped, because the store was closed")
            if self._filesystem is None:
                options: dict[str, Any] = {}
                if self._protocol.startswith("http"):
                    options["get_client"] = _http_client
                if self._protocol == "s3":  # one place retries, and says so
                    given = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
                    options["config_kwargs"] = {"retries": {"max_attempts": 0}, **given}
                # An instance of our own: fsspec's shared ones are not made for being closed.
                filesystem = fsspec.filesystem(self._protocol, skip_instance_cache=True, **options)
                if self._protocol == "s3":
                    filesystem.retries = 1
                if not filesystem.async_impl:
                    filesystem = AsyncFileSystemWrapper(filesystem, asynchronous=False)
                self._filesystem = filesystem
                _in_use[id(filesystem)] = filesystem
            return self._filesystem


def _result(future: Future[_Answer]) -> _Answer:
    try:
        return future.result()
    except concurrent.futures.CancelledError as error:
        raise Stopped("reading was stopped, because the store was closed") from error


async def _http_client(**options: Any) -> Any:
    """The connections of a web file system; a compressed body is not asked for, since offsets count stored bytes."""
    import aiohttp

    ours = {
        "connector": aiohttp.TCPConnector(limit=MAX_REQUESTS),
        "timeout": aiohttp.ClientTimeout(total=None, sock_connect=TIMEOUT, sock_read=TIMEOUT),
        "raise_for_status": _check_answer,
    }
    headers = {"Accept-Encoding": "identity", **options.pop("headers", {})}
    return aiohttp.ClientSession(**{**ours, **options}, headers=headers)


async def _check_answer(response: Any) -> None:
    """Raise for an error, and for another range than the one that was asked for: fsspec would return its bytes."""
    _refuse_status(response)
    wanted = response.request_info.headers.get("Range", "").removeprefix("bytes=")
    given = response.headers.get("Content-Range", "no Content-Range")
    if not wanted or (response.status == 206 and given.startswith(f"bytes {wanted}/")):
        return
    response.close()  # the rest of the file is not worth waiting for
    if response.status != 206:
        raise NoRanges
    raise ConnectionError(f"asked for {wanted}, the server answered with {given!r}")


def _refuse_status(response: Any) -> None:
    """Raise aiohttp's error for a status without its address and headers: a traceback would show what FSSPEC_HTTP
    adds to every request."""
    import aiohttp
    from multidict import CIMultiDict, CIMultiDictProxy

    if response.status >= 400:
        response.release()
        url, headers = response.request_info.url.with_query(None), CIMultiDictProxy(CIMultiDict[str]())
        asked = aiohttp.RequestInfo(url, response.request_info.method, headers)
        raise aiohttp.ClientResponseError(asked, (), status=response.status, message=response.reason or "")


async def _http_size(filesystem: Any, address: str) -> int | None:
    """Bytes of a file, None if there is none: not every server answers HEAD, all say it beside a range."""
    session = await filesystem.set_session()
    options = {**filesystem.kwargs, "headers": {**filesystem.kwargs.get("headers", {}), "Range": "bytes=0-0"}}
    async with session.get(filesystem.encode_url(address), **options, raise_for_status=False) as response:
        if response.status in (404, 410):
            return None
        if response.status != 416:  # an empty file
            _refuse_status(response)
        total = response.headers.get("Content-Range", "").rpartition("/")[2] or response.headers.get("Content-Length")
        if response.status == 206:
            await response.read()  # a byte: the connection stays open
        if not total or not str(total).isdigit():
            raise ConnectionError("the server does not say how large the file is")
        return int(total)


def _text(error: BaseException) -> str:
    """A failure in one line. Web servers' errors hold the address they redirected to, which may be a signed one."""
    if hasattr(error, "request_info"):
        return f"{type(error).__name__}: {_status(error)} {getattr(error, 'message', '')}".strip()
    return redacted(f"{type(error).__name__}: {error}".strip(": "))


def _status(error: BaseException) -> int | None:
    """The HTTP status behind an error of any of the packages."""
    for cause in (error, error.__cause__):  # s3fs puts an OSError before botocore's error
        response = getattr(cause, "response", None)
        if isinstance(response, Mapping):
            return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    for holder, attribute in ((error, "status"), (error, "code"), (getattr(error, "response", None), "status_code")):
        status = getattr(holder, attribute, None)
        if isinstance(status, int):
            return status
    return None


def _foreign(transient: bool) -> tuple[type[BaseException], ...]:
    """Errors of requests, or those of them that stay; a package that is not loaded cannot raise any."""
    found = [kind for kind in _FOREIGN_ERRORS if kind[0] in sys.modules and kind[2] is transient]
    kinds = tuple(getattr(sys.modules[module], name) for module, name, _ in found)
    return (OSError, asyncio.TimeoutError, NoRanges, *kinds) if transient else kinds
