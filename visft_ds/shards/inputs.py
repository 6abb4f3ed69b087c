"""Inputs of a conversion: JSON files and a folder of images, on a local disk or behind a URL."""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from visft_ds.config.preflight import is_url
from visft_ds.redaction import redacted
from visft_ds.shards.remote import open_url, readable_errors

#: A folder that is a file, a name that no file can have, or links in a circle are as good as none.
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)
#: Requests that wait at the same time, where each file must be asked for its size.
_REQUESTS = 32
#: A server that is busy for a moment must not end a build of hours.
_ATTEMPTS, _FIRST_PAUSE = 4, 0.5  # seconds, then twice as long each time
_GONE = (404, 410)  # HTTP status

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class MadeJson:
    """A COCO file that was made of annotations in another format."""

    name: str
    data: bytes
    findings: tuple[tuple[str, str], ...] = ()  #: (kind, example) of what was odd

    def __str__(self) -> str:
        return self.name


def read_bounded(path: Path, most: int) -> bytes:
    """A whole local file of at most so many bytes. Raises ValueError, also where it is none."""
    try:
        if not path.is_file():
            raise ValueError(f"{path} is not there, or no file")
        if (size := path.stat().st_size) > most:
            raise ValueError(f"{path} has {size} bytes; allowed are {most}")
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error


def read_file(place: str | Path | MadeJson) -> bytes:
    """A whole file.

    Raises:
        ValueError: it is not there or cannot be read.
    """
    if isinstance(place, MadeJson):
        return place.data
    try:
        if is_url(place):
            filesystem, path = open_url(str(place))
            with readable_errors(str(place)):
                data: bytes = filesystem.cat_file(path)
            return data
        return Path(place).read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {redacted(place)}: {error.strerror or error}") from error


@dataclass(frozen=True)
class ImageFile:
    """Size in bytes and version stamp of a file of an image folder."""

    size: int
    stamp: str  #: changes when the content does: modification time, or the store's ETag, hash or date


class ImageFolder(Protocol):
    """The images of a data set; safe for threads."""

    def find(self, names: Sequence[str]) -> list[ImageFile | None]:
        """Sizes of these files, None for each that is not there."""
        ...

    def read(self, name: str) -> bytes:
        """A whole file. Raises RuntimeError when that fails."""
        ...


def open_images(place: str | Path) -> ImageFolder:
    """The folder of images at a path or URL.

    Raises:
        ValueError: no such local folder; an unknown protocol, or one whose package is not installed.
    """
    if is_url(place):
        return _RemoteImages(str(place).rstrip("/"))
    folder = Path(place)
    if not folder.is_dir():
        raise ValueError(f"the images folder {folder} does not exist")
    return _LocalImages(folder)


class _LocalImages:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find(self, names: Sequence[str]) -> list[ImageFile | None]:
        return [self._find(name) for name in names]

    def _find(self, name: str) -> ImageFile | None:
        try:
            status = os.stat(self._folder / name)
        except OSError as error:
            if error.errno in _NOT_THERE:
                return None
            raise
        return ImageFile(status.st_size, str(status.st_mtime_ns)) if stat.S_ISREG(status.st_mode) else None

    def read(self, name: str) -> bytes:
        path = self._folder / name
        try:
            return path.read_bytes()
        except OSError as error:
            raise RuntimeError(f"cannot read {path}: {error.strerror}") from error


class _RemoteImages:
    def __init__(self, url: str) -> None:
        self._url = url
        self._filesystem, self._root = open_url(url)

    def find(self, names: Sequence[str]) -> list[ImageFile | None]:
        if self._url.lower().startswith(("http://", "https://")):  # HTTP has no listing
            with ThreadPoolExecutor(_REQUESTS) as pool:
                return list(pool.map(self._ask, names))
        with readable_errors(self._url):
            self._filesystem.invalidate_cache()
            listing = self._filesystem.find(self._root, detail=True)
        prefix = self._root.rstrip("/") + "/"
        known = {path.removeprefix(prefix): entry for path, entry in listing.items()}
        return [_found(known[name]) if name in known else None for name in names]

    def _ask(self, name: str) -> ImageFile | None:
        place = f"{self._root}/{name}"
        entry = _patiently(place, lambda: self._info(place))
        found = None if entry is None else _found(entry)
        if entry is not None and found is None:
            raise ValueError(
                f"{redacted(place)}: the server does not state its size, without which no shard can be planned"
            )
        return found

    def _info(self, place: str) -> dict[str, Any] | None:
        """Metadata of a file from the server; None only if it states that there is none. Raises OSError."""
        try:
            entry: dict[str, Any] = self._filesystem.info(place)
        except FileNotFoundError as error:
            # fsspec says so of any failure; a server that is down must not leave every image out.
            if error.__cause__ is None or getattr(error.__cause__, "status", None) in _GONE:
                return None
            raise OSError(str(error.__cause__) or type(error.__cause__).__name__) from error
        return entry

    def read(self, name: str) -> bytes:
        place = f"{self._root}/{name}"
        data: bytes = _patiently(place, lambda: self._filesystem.cat_file(place))
        return data


def _patiently(place: str, request: Callable[[], Answer]) -> Answer:
    """The answer to a request that is made again where it fails for a reason that may pass. Raises RuntimeError."""
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            with readable_errors(place):
                return request()
        except OSError as error:
            if attempt == _ATTEMPTS or isinstance(error, FileNotFoundError):
                raise RuntimeError(str(error)) from error
            time.sleep(_FIRST_PAUSE * 2 ** (attempt - 1))
    raise AssertionError("the last attempt returns or raises")


def _found(entry: dict[str, Any]) -> ImageFile | None:
    """Size and stamp out of the metadata of a store; None if it does not state the size."""
    stamp = next(
        (
            str(entry[key])
            for key in ("ETag", "etag", "md5Hash", "LastModified", "Last-Modified", "mtime")
            if entry.get(key)
        ),
        "",
    )
    return None if entry.get("size") is None else ImageFile(int(entry["size"]), stamp)
