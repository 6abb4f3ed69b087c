"""Sources of bytes: the files of one folder on a disk or behind a URL.

Everything that reads shards asks a `Store`; `open_store` decides once whether the folder is local, on a web server or
in an object store.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from visft_ds.redaction import redacted

#: Protocol of a URL -> the package that speaks it.
REMOTE_PROTOCOLS = {
    "http": "aiohttp",
    "https": "aiohttp",
    "s3": "s3fs",
    "gs": "gcsfs",
    "hf": "huggingface_hub",
    "memory": "fsspec",  # files of this process, for tests
}
_SCHEME = re.compile(r"([^/]*?):(?://|(?<=pipe:))")

#: Files beyond this number are opened for each read, because many systems allow only 1024 open files.
_MAX_OPEN = 256

_CHUNK = 1 << 20
_AGAIN = "Make the split again by the same `visft shards build`, or copy the file there again."

#: (name of a file, offset, size) in bytes.
Part = tuple[str, int, int]


class Stopped(RuntimeError):
    """Reading from a store that was closed meanwhile."""


@dataclass(frozen=True)
class CacheOptions:
    """A folder for copies of remote files, shared by all processes of a host."""

    folder: Path  #: made if it is not there
    max_bytes: int  #: of all copies together; those not used for longest go first


@dataclass(frozen=True)
class Expected:
    """Size and digest of a file according to a manifest."""

    bytes: int
    sha256: str


class Store(Protocol):
    """The files of one folder. Safe for threads; a pickled or forked copy opens its own connections at first use."""

    @property
    def where(self) -> str:
        """Path or URL, for messages."""
        ...

    def expect(self, files: Mapping[str, Expected]) -> None:
        """Say what a manifest knows of files: only these are cached. Raises ValueError if the cache is too small."""
        ...

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Bytes [offset, offset + size) of a file, fewer only where it ends.

        Raises:
            ValueError: there is no such file, or it may not be read.
            RuntimeError: the other side failed, again and again.
        """
        ...

    def load(self, name: str) -> bytes:
        """All of a small file; raises as `read`."""
        ...

    def sizes(self, names: Collection[str] | None = None) -> dict[str, int]:
        """Bytes of those of `names` that exist, or of all files of the folder.

        Raises ValueError for all files where the protocol cannot list them (http).
        """
        ...

    def will_need(self, parts: Sequence[Part]) -> None:
        """Hint that these parts are about to be read, in this order. Returns at once."""
        ...

    def forget(self, name: str, offset: int, size: int) -> bool:
        """Drop copies of a part that proved to be damaged; False if reading it again would give the same bytes."""
        ...

    def open(self, name: str) -> BinaryIO | None:
        """A file for memory mapping, fetched to a local disk if need be; None if it is only to be had by `load`.

        It stays readable, should the cache give up its copy. Raises as `read`.
        """
        ...

    def another(self) -> Store:
        """The same folder with descriptors, connections and read-ahead of its own."""
        ...

    def close(self) -> None:
        """Stop reading ahead, close files and connections. A later read opens them again."""
        ...


def open_store(root: Path | str, cache: CacheOptions | None = None) -> Store:
    """The store of a folder: a path, or a URL of one of `REMOTE_PROTOCOLS`.

    Nothing is opened before the first read. `cache` is for remote folders; local files are never copied.

    Raises:
        ValueError: a protocol that is not allowed (`pipe:` runs programs), or whose package is not installed.
    """
    found = None if isinstance(root, Path) else _SCHEME.match(root)
    if found is None:
        assert not re.match(r"(https?|s3|gs|hf|memory):/", str(root)), f"{root}: a URL that became a path lost a slash"
        return LocalStore(Path(root))
    if found[1] not in REMOTE_PROTOCOLS:
        allowed = ", ".join(f"{name}://" for name in REMOTE_PROTOCOLS if name != "memory")
        raise ValueError(
            f"{redacted(root)}: {found[0]} is not allowed; give the plain path of a folder, or a URL that begins with "
            f"{allowed}"
        )
    # Imported here: fsspec and its event loop are not for those who read local disks.
    from visft_ds.data.remote import RemoteStore

    return RemoteStore(str(root), found[1], cache)


class LocalStore:
    """A folder on a disk.

    `pread` has no position that threads or forked processes could share.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return LocalStore, (self.root,)

    @property
    def where(self) -> str:
        """The path."""
        return str(self.root)

    def expect(self, files: Mapping[str, Expected]) -> None:
        """Nothing to prepare."""

    def read(self, name: str, offset: int, size: int) -> bytes:
        """See `Store.read`."""
        descriptor = self._descriptors.get(name)
        if descriptor is None:
            descriptor = self._keep_open(name)
        if descriptor is not None:
            return pread_all(descriptor, size, offset)
        descriptor = self._open(name)
        try:
            return pread_all(descriptor, size, offset)
        finally:
            os.close(descriptor)

    def load(self, name: str) -> bytes:
        """See `Store.load`."""
        try:
            return (self.root / name).read_bytes()
        except FileNotFoundError as error:
            raise ValueError(f"{self.root / name} is missing. {_AGAIN}") from error

    def sizes(self, names: Collection[str] | None = None) -> dict[str, int]:
        """See `Store.sizes`."""
        if not self.root.is_dir():
            return {}
        with os.scandir(self.root) as entries:
            return {
                entry.name: entry.stat().st_size
                for entry in entries
                if (names is None or entry.name in names) and entry.is_file()
            }

    def will_need(self, parts: Sequence[Part]) -> None:
        """Nothing: reading from a disk ahead of the threads that do it already gains nothing."""

    def forget(self, name: str, offset: int, size: int) -> bool:
        """False: there are no copies."""
        return False

    def open(self, name: str) -> BinaryIO:
        """See `Store.open`."""
        return os.fdopen(self._open(name), "rb")

    def another(self) -> LocalStore:
        """See `Store.another`."""
        return LocalStore(self.root)

    def close(self) -> None:
        """Close all files."""
        with self._lock:
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()

    def _keep_open(self, name: str) -> int | None:
        """A descriptor that stays open; None where there are enough of them."""
        with self._lock:
            if name not in self._descriptors:
                if len(self._descriptors) >= _MAX_OPEN:
                    return None
                self._descriptors[name] = self._open(name)
            return self._descriptors[name]

    def _open(self, name: str) -> int:
        try:
            return os.open(self.root / name, os.O_RDONLY)
        except FileNotFoundError as error:
            raise ValueError(f"{self.root / name} is missing. {_AGAIN}") from error


def pread_all(descriptor: int, size: int, offset: int) -> bytes:
    """Like `os.pread`, which may return less than asked for before the end of the file, and takes memory for all."""
    if size > _CHUNK:
        size = min(size, max(0, os.fstat(descriptor).st_size - offset))
    data = os.pread(descriptor, size, offset)
    while len(data) < size:
        more = os.pread(descriptor, size - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


def file_digest(file: BinaryIO) -> str:
    """sha256 of a file that was just opened, in hexadecimal; memory does not grow with the file."""
    return hashlib.file_digest(cast(BufferedReader, file), "sha256").hexdigest()  # BinaryIO is less than all files can


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on disk; without it a power failure may undo a rename."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
