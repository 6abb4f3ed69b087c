"""Shards behind a URL: whole files, copied into a folder of this machine when they are first needed.

Protocols, credentials and connections are fsspec's and its packages'.
"""

from __future__ import annotations

import errno
import hashlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from filelock import FileLock

from visft_ds.redaction import redacted

#: Protocol of a URL -> the package that implements it.
_PACKAGES = {
    "http": "aiohttp",
    "https": "aiohttp",
    "s3": "s3fs",
    "gs": "gcsfs",
    "hf": "huggingface_hub",
    "memory": "",
}
#: Seconds between attempts at a server that does not answer: five minutes in all.
_PAUSES = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0, 60.0, 60.0, 60.0)
#: A pause from here on is announced.
_LONG_PAUSE = 4.0
#: Damaged copies of a file that are downloaded before it is an error.
_MAX_DAMAGED = 4
#: What the operating system says of this machine's own disk, whatever the server does.
_OWN_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
_GIVE_CREDENTIALS = (
    "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; "
    "FSSPEC_S3_ANON=true reads a public bucket"
)
_TIMEOUT = 60.0  # seconds without a byte


def is_url(address: str | Path) -> bool:
    """Return True if an address is read over a network; it is looked for only when it is opened."""
    return "://" in str(address) and not str(address).lower().startswith("file:")


def check_protocol(url: str) -> None:
    """Raise ValueError for a protocol that is not allowed, or whose package is not installed."""
    protocol = url.partition("://")[0]
    if protocol not in _PACKAGES:
        allowed = ", ".join(f"{name}://" for name, package in _PACKAGES.items() if package)
        raise ValueError(f"{redacted(url)}: give a folder, or a URL that begins with {allowed}")
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        package = _PACKAGES[protocol]
        raise ValueError(f"{redacted(url)} needs the package {package}: pip install {package}") from error


@dataclass(frozen=True)
class Cache:
    """Folder for copies of remote shards, shared by all processes of a machine.

    Copies are named by their sha256, so that a name means one content forever.
    """

    folder: Path | str | None = None  #: None: ~/.cache/visft/shards
    max_bytes: int = 200_000_000_000  #: of all copies; the least recently read ones go first

    def copy(self, url: str, size: int, sha256: str) -> Path:
        """Path of this machine's copy of a file, made now if there is none; one process of the machine makes
        it.

        Raises:
            ValueError: the file is not there, or not what the manifest says.
            TimeoutError: the server did not answer for minutes.
            OSError: this machine's disk is full.
        """
        folder = Path(self.folder or "~/.cache/visft/shards").expanduser()
        path = folder / f"{sha256}{Path(url).suffix}"
        if path.exists():
            return path
        if size > self.max_bytes:
            limit = f"visft.data.cache_bytes={self.max_bytes:,}"
            raise ValueError(f"{redacted(url)} has {size:,} bytes, more than {limit}")
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f".{sha256}.lock"):
            if not path.exists():
                self._make_room(folder, size)
                unfinished = folder / f".{sha256}.part"
                try:
                    download(url, unfinished, lambda: sha256_of(unfinished) == sha256)
                    unfinished.replace(path)
                finally:
                    unfinished.unlink(missing_ok=True)
        return path

    def open(self, url: str, size: int, sha256: str) -> int:
        """Descriptor of the copy of a shard, which counts as read now; raises as `copy`."""
        while True:
            try:
                descriptor = os.open(self.copy(url, size, sha256), os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:  # another process has just made room
                continue
            os.utime(descriptor)
            return descriptor

    def _make_room(self, folder: Path, size: int) -> None:
        """Remove the shards read least recently until `size` more bytes fit. Open ones stay readable."""
        with FileLock(folder / ".room.lock"):
            status_of = {path: path.stat() for path in folder.glob("*.tar")}
            total = size + sum(status.st_size for status in status_of.values())
            for path in sorted(status_of, key=lambda path: status_of[path].st_mtime):
                if total <= self.max_bytes:
                    break
                path.unlink()
                total -= status_of[path].st_size


@contextmanager
def opened(address: str, folder: Path | None = None) -> Iterator[Path]:
    """A path at which a file can be read: its own, or that of a copy which goes afterwards.

    The copy lies in `folder`, by default in the system's one for temporary files.

    Raises as `Cache.copy`.
    """
    if not is_url(address):
        yield Path(address)
        return
    with tempfile.TemporaryDirectory(prefix=".visft-", dir=folder) as temporary:
        path = Path(temporary, "file")
        download(address, path)
        yield path


def download(url: str, target: Path, is_whole: Callable[[], bool] = lambda: True) -> None:
    """Write the content of a URL into a file; `is_whole` looks at what arrived. Raises as `Cache.copy`."""
    check_protocol(url)
    options: dict[str, Any] = {}
    if url.startswith("http"):
        import aiohttp  # its own limit is five minutes for a whole file

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_TIMEOUT, sock_read=_TIMEOUT)
        options = {"client_kwargs": {"timeout": timeout}}
    where = redacted(url)
    damaged = 0
    for attempt, pause in enumerate((*_PAUSES, 0.0), 1):
        try:
            filesystem, source = fsspec.url_to_fs(url, **options)
            filesystem.get_file(source, str(target))
        except Exception as error:  # noqa: BLE001  every protocol's package has errors of its own
            answer = _temporary_failure(where, error)
            if attempt > len(_PAUSES):
                raise TimeoutError(f"{where} failed {attempt} times, the last time by {answer}") from None
            if pause >= _LONG_PAUSE:
                left = sum(_PAUSES[attempt - 1 :])
                attempts = f"trying again in {pause:.0f} s, giving up in {left:.0f} s"
                print(f"waiting for {where} ({answer}): {attempts}", file=sys.stderr, flush=True)
        else:
            if is_whole():
                return
            damaged += 1
            if damaged == _MAX_DAMAGED or attempt > len(_PAUSES):
                raise ValueError(
                    f"{where} does not match its manifest: copy all files of the split there again"
                )
        time.sleep(pause)


def _temporary_failure(where: str, error: Exception) -> str:
    """Words of an error that may pass. Raises ValueError or OSError for one that does not."""
    answer = redacted(f"{type(error).__name__} {error}")
    refused = getattr(error, "status", 0) in (401, 403)
    if type(error).__name__ == "NoCredentialsError":  # botocore's, which may not be installed
        raise ValueError(f"{where} cannot be read: {answer}; {_GIVE_CREDENTIALS}") from None
    if refused or isinstance(error, FileNotFoundError | PermissionError):
        raise ValueError(f"{where} cannot be read: {answer}") from None
    if isinstance(error, OSError) and error.errno in _OWN_DISK:
        raise error
    return answer


def sha256_of(path: Path) -> str:
    """sha256 of a file's bytes, lower-case hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
