"""Requests to web servers and object stores: byte ranges of files, with retries, through fsspec.

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
import pkgutil
import random
import re
import threading
from collections.abc import Callable, Collection, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO, TypeVar

import fsspec
import fsspec.asyn

from visft_ds.data.store import REMOTE_PROTOCOLS, StoreFailed

#: Attempts at a request in all, and the longest wait before the second of them in seconds; it doubles each time.
ATTEMPTS = 5
FIRST_WAIT = 0.5
#: Seconds one request may take.
TIMEOUT = 120.0
#: Requests of one store at the same time.
MAX_REQUESTS = 16

_TRANSIENT_STATUS = {408, 425, 429, 500, 502, 503, 504}
_PERMANENT_ERRNO = {errno.EINVAL, errno.EPERM, errno.ENAMETOOLONG, errno.EISDIR}
#: What the packages raise besides OSError when a request fails.
_ERRORS: Mapping[str, tuple[str, ...]] = {
    "http": ("aiohttp:ClientError",),
    "https": ("aiohttp:ClientError",),
    "s3": ("aiohttp:ClientError", "botocore.exceptions:BotoCoreError", "botocore.exceptions:ClientError"),
    "gs": ("aiohttp:ClientError", "gcsfs.retry:HttpError"),
    "hf": ("httpx:HTTPError",),
    "memory": (),
}
#: Those of them that no further attempt will mend.
_PERMANENT: Mapping[str, tuple[str, ...]] = {
    "http": ("aiohttp:InvalidURL", "aiohttp:ClientSSLError"),
    "https": ("aiohttp:InvalidURL", "aiohttp:ClientSSLError"),
    "s3": (
        "botocore.exceptions:NoCredentialsError",
        "botocore.exceptions:PartialCredentialsError",
        "botocore.exceptions:ProfileNotFound",
        "botocore.exceptions:ParamValidationError",
    ),
}

#: File systems in use. A forked child keeps its parent's alive through this list: to drop them would close sockets and
#: take them out of an epoll instance that both processes share, and the parent would wait for ever.
_in_use: list[Any] = []

# fsspec forgets its event loop after a fork, but not the lock around making one, which another thread may have held.
os.register_at_fork(after_in_child=fsspec.asyn.reset_lock)

_log = logging.getLogger(__name__)
_Answer = TypeVar("_Answer")


def check_installed(protocol: str) -> None:
    """Raise ValueError unless the package that speaks a protocol is there."""
    package = REMOTE_PROTOCOLS[protocol]
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"{protocol}:// needs the package {package}: pip install 'visft_ds[remote]'")


class Transport:
    """The files below one URL, for the threads of one process.

    Nothing is opened before the first request.
    """

    def __init__(self, url: str, protocol: str) -> None:
        self.url = url
        self.protocol = protocol
        #: True as soon as a server has answered a range with something else.
        self.ignores_ranges = False
        self._failures: tuple[type[BaseException], ...] = (
            OSError,
            asyncio.TimeoutError,
            concurrent.futures.TimeoutError,
            *_classes(_ERRORS, protocol),
        )
        self._permanent = _classes(_PERMANENT, protocol)
        self._slots = threading.BoundedSemaphore(MAX_REQUESTS)
        self._lock = threading.Lock()
        self._filesystem: Any = None
        self._running: set[concurrent.futures.Future[Any]] = set()
        self._closed = threading.Event()

    def fetch(self, name: str, offset: int, size: int, *, exact: bool = False) -> bytes:
        """Bytes [offset, offset + size) of a file by one request, fewer only where it ends, and never with `exact`.

        Raises:
            ValueError: there is no such file, it may not be read, or the server cannot give ranges.
            RuntimeError: the last attempt failed too.
        """

        def attempt() -> bytes | None:
            data = self._range(self.address(name), offset, size)
            if data is not None and (len(data) > size or (exact and len(data) < size)):
                raise ConnectionError(f"{len(data)} bytes came instead of {size}")
            return data

        data = self._retry(f"{self.address(name)} [{offset}:{offset + size}]", attempt)
        if data is None:
            raise ValueError(
                f"{self.address(name)}: the server does not answer range requests, so single samples cannot be read "
                "from it: copy the shards into a folder, or use another server"
            )
        return data

    def fetch_all(self, name: str) -> bytes:
        """A whole small file; raises as `fetch`."""
        return self._retry(self.address(name), lambda: self._whole(self.address(name)))

    def copy(self, name: str, file: BinaryIO) -> None:
        """Write a whole file by one request, for web servers that cannot give ranges; raises as `fetch`."""

        def attempt() -> None:
            file.seek(0)
            filesystem = self._open()
            self._wait(filesystem, lambda: filesystem._get_file(self.address(name), file), bounded=False)

        self._retry(self.address(name), attempt)

    def sizes(self, names: Collection[str] | None) -> dict[str, int]:
        """Bytes of those of `names` that exist, or of all files; raises ValueError for all files behind http."""
        if not self.protocol.startswith("http"):
            found = self._retry(self.address(""), self._list)
            return {name: size for name, size in found.items() if names is None or name in names}
        if names is None:
            raise ValueError(f"{self.address('')}: files behind {self.protocol}:// cannot be listed; name them")
        with ThreadPoolExecutor(MAX_REQUESTS, "sizes") as pool:
            found_sizes = zip(names, pool.map(self._size, names), strict=True)
            return {name: size for name, size in found_sizes if size is not None}

    def close(self) -> None:
        """End what is under way and close all connections. The object cannot be used any more."""
        self._closed.set()
        with self._lock:
            for future in self._running:
                future.cancel()
            if self._filesystem is not None:
                _in_use.remove(self._filesystem)
                self._filesystem = None  # its finaliser closes the connections

    def address(self, name: str) -> str:
        """The URL of a file."""
        return f"{self.url}/{name}" if name else self.url

    def _retry(self, what: str, attempt: Callable[[], _Answer]) -> _Answer:
        for number in range(1, ATTEMPTS + 1):
            try:
                with self._slots:
                    return attempt()
            except concurrent.futures.CancelledError as error:
                raise RuntimeError(f"{what}: reading was stopped, because the store was closed") from error
            except self._failures as error:
                self._refuse_permanent(what, error)
                told = _told(error)
                if number == ATTEMPTS or self._closed.is_set():
                    raise StoreFailed(f"{what}: attempt {number} of {ATTEMPTS} failed too; {told}") from error
                # Drawn, so that many processes that failed together do not come back together.
                wait = random.uniform(0.5, 1) * FIRST_WAIT * 2 ** (number - 1)
                _log.warning("%s: %s; attempt %d of %d follows in %.2f s", what, told, number + 1, ATTEMPTS, wait)
                self._closed.wait(wait)
        raise AssertionError("the last attempt returns or raises")

    def _refuse_permanent(self, what: str, error: BaseException) -> None:
        """Raise ValueError for a failure that another attempt would only repeat."""
        status = _status(error)
        if isinstance(error, FileNotFoundError) or status in (404, 410):
            raise ValueError(f"{what}: there is no such file (or it is hidden). Check the URL") from error
        if isinstance(error, PermissionError) or status in (401, 403):
            raise ValueError(f"{what}: access was denied ({_told(error)}). Check credentials and rights") from error
        wrong = isinstance(error, self._permanent) or getattr(error, "errno", None) in _PERMANENT_ERRNO
        if wrong or (status is not None and 400 <= status < 500 and status not in _TRANSIENT_STATUS):
            raise ValueError(f"{what}: {_told(error)}") from error

    def _range(self, address: str, offset: int, size: int) -> bytes | None:
        """Try once to read a range of bytes; None if the server does not give ranges."""
        if size <= 0:
            return b""
        filesystem = self._open()
        if self.protocol.startswith("http"):
            return self._wait(filesystem, lambda: self._http_range(filesystem, address, offset, size))
        if filesystem.async_impl:
            return self._wait(filesystem, lambda: filesystem._cat_file(address, start=offset, end=offset + size))
        # Without a cache of its own, which would read megabytes ahead of every sample.
        data: bytes = filesystem.cat_file(address, start=offset, end=offset + size, cache_type="none")
        return data

    async def _http_range(self, filesystem: Any, address: str, offset: int, size: int) -> bytes | None:
        wanted = {"Range": f"bytes={offset}-{offset + size - 1}"}
        async with await _http_request(filesystem, "GET", address, wanted) as response:
            if response.status == 416:  # the file ends before
                return b""
            response.raise_for_status()
            if response.status != 206:
                whole = response.content_length
                if offset == 0 and whole is not None and whole <= size:
                    return await response.read()
                self.ignores_ranges = True
                response.close()  # the rest of the file is not worth waiting for
                return None
            given = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", response.headers.get("Content-Range", ""))
            if given is None or int(given[1]) != offset or int(given[2]) >= offset + size:
                response.close()
                told = response.headers.get("Content-Range", "no Content-Range")
                raise ConnectionError(f"asked for {wanted['Range']}, the server answered with {told!r}")
            data: bytes = await response.read()
            if len(data) != int(given[2]) - offset + 1:
                raise ConnectionError(f"{len(data)} bytes came where {response.headers['Content-Range']} was said")
            return data

    def _whole(self, address: str) -> bytes:
        filesystem = self._open()
        if self.protocol.startswith("http"):
            return self._wait(filesystem, lambda: _http_whole(filesystem, address))
        if filesystem.async_impl:
            return self._wait(filesystem, lambda: filesystem._cat_file(address))
        data: bytes = filesystem.cat_file(address)
        return data

    def _list(self) -> dict[str, int]:
        filesystem = self._open()
        try:
            if filesystem.async_impl:
                entries = self._wait(filesystem, lambda: filesystem._ls(self.url, detail=True, refresh=True))
            else:
                entries = filesystem.ls(self.url, detail=True)
        except FileNotFoundError:
            return {}
        files = (entry for entry in entries if entry["type"] == "file")
        return {entry["name"].rsplit("/", 1)[-1]: int(entry["size"]) for entry in files}

    def _size(self, name: str) -> int | None:
        def attempt() -> int | None:
            filesystem = self._open()
            return self._wait(filesystem, lambda: _http_size(filesystem, self.address(name)))

        return self._retry(self.address(name), attempt)

    def _open(self) -> Any:
        with self._lock:
            if self._closed.is_set():
                raise concurrent.futures.CancelledError
            if self._filesystem is None:
                options: dict[str, Any] = {}
                if self.protocol == "s3":  # one place retries, and says so
                    given = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
                    options["config_kwargs"] = {"retries": {"max_attempts": 0}, **given}
                # An instance of our own: fsspec's shared ones are not made for being closed.
                self._filesystem = fsspec.filesystem(self.protocol, skip_instance_cache=True, **options)
                if self.protocol == "s3":
                    self._filesystem.retries = 1
                _in_use.append(self._filesystem)
            return self._filesystem

    def _wait(
        self, filesystem: Any, work: Callable[[], Coroutine[Any, Any, _Answer]], *, bounded: bool = True
    ) -> _Answer:
        """Run a coroutine on fsspec's event loop, which has a thread of its own."""

        async def run() -> _Answer:  # makes the coroutine there: one that is cancelled early was never begun
            return await asyncio.wait_for(work(), TIMEOUT if bounded else None)

        future = asyncio.run_coroutine_threadsafe(run(), filesystem.loop)
        with self._lock:
            self._running.add(future)
            if self._closed.is_set():
                future.cancel()
        try:
            return future.result()
        finally:
            with self._lock:
                self._running.discard(future)


async def _http_request(filesystem: Any, method: str, address: str, headers: Mapping[str, str]) -> Any:
    """A response whose body is not yet read; compressed bodies are refused, since offsets count stored bytes."""
    session = await filesystem.set_session()
    sent = {**filesystem.kwargs.get("headers", {}), "Accept-Encoding": "identity", **headers}
    options = {**filesystem.kwargs, "allow_redirects": True, "headers": sent}
    return await session.request(method, filesystem.encode_url(address), **options)


async def _http_whole(filesystem: Any, address: str) -> bytes:
    async with await _http_request(filesystem, "GET", address, {}) as response:
        response.raise_for_status()
        data: bytes = await response.read()
        return data


async def _http_size(filesystem: Any, address: str) -> int | None:
    """Bytes of a file; None if there is none."""
    async with await _http_request(filesystem, "HEAD", address, {}) as response:
        if response.status in (404, 410):
            return None
        if response.status not in (405, 501):
            response.raise_for_status()
            length = response.headers.get("Content-Length")
            if length is not None:
                return int(length)
    # A server without HEAD, or one that does not say: the first byte's Content-Range tells the length of the whole.
    async with await _http_request(filesystem, "GET", address, {"Range": "bytes=0-0"}) as response:
        if response.status in (404, 410):
            return None
        response.raise_for_status()
        total = response.headers.get("Content-Range", "").rpartition("/")[2] or response.headers.get("Content-Length")
        response.close()
        if not total or not str(total).isdigit():
            raise ConnectionError("the server does not say how large the file is")
        return int(total)


def _told(error: BaseException) -> str:
    """A failure in one line. Web servers' errors hold the address they redirected to, which may be a signed one."""
    if hasattr(error, "request_info"):
        return f"{type(error).__name__}: {_status(error)} {getattr(error, 'message', '')}".strip()
    return f"{type(error).__name__}: {error}".strip(": ")


def _status(error: BaseException) -> int | None:
    """The HTTP status behind an error of any of the packages."""
    for one in (error, error.__cause__):  # s3fs puts an OSError before botocore's error
        response = getattr(one, "response", None)
        if isinstance(response, Mapping):
            return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    for holder, attribute in ((error, "status"), (error, "code"), (getattr(error, "response", None), "status_code")):
        status = getattr(holder, attribute, None)
        if isinstance(status, int):
            return status
    return None


def _classes(table: Mapping[str, tuple[str, ...]], protocol: str) -> tuple[type[BaseException], ...]:
    return tuple(pkgutil.resolve_name(name) for name in table.get(protocol, ()))
