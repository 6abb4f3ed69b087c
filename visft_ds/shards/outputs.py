"""Where a conversion writes to: a local folder, or a URL to which each finished file is uploaded.

Either way a file bears its final name only when it is complete.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from visft_ds.shards.remote import is_url, local_path, open_url, readable_errors
from visft_ds.shards.verify import file_sha256

#: Here an upload appears all at once when it is complete; elsewhere it gets its name when it is.
_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "hf"}


class Output(Protocol):
    """The folder of a split; names are relative to it, those of records begin with `work/`."""

    scratch: Path  #: a local folder for files in the making, for one build at a time
    work: str  #: name of the hidden folder of the records

    def open(self) -> None:
        """Make the folders."""
        ...

    def names(self) -> list[str]:
        """Names of the files in the folder itself."""
        ...

    def work_names(self) -> list[str]:
        """Names of the records."""
        ...

    def read(self, name: str) -> bytes | None:
        """A whole file, or None if there is none."""
        ...

    def write(self, name: str, data: bytes) -> None:
        """Write a small file at once or not at all."""
        ...

    def finish(self, temporary: Path, name: str) -> None:
        """Give a complete local file its place; it is gone from where it was."""
        ...

    def remove(self, name: str) -> None:
        """Delete a file if it is there."""
        ...

    def holds(self, name: str, size: int, sha256: str) -> bool:
        """Whether a file is there and whole, as far as can be told without fetching it."""
        ...


def open_output(place: str | Path, split: str) -> Output:
    """The output at a path or URL; nothing is made before `Output.open`.

    Raises:
        ValueError: an unknown protocol, one whose package is not installed, or one that nothing can be written to.
    """
    if not is_url(place):
        return LocalOutput(local_path(place), split)
    if str(place).lower().startswith(("http://", "https://")):
        raise ValueError(f"--out {place}: nothing can be written by HTTP; give a folder or the URL of an object store")
    return RemoteOutput(str(place).rstrip("/"), split)


@contextmanager
def exclusive(scratch: Path) -> Iterator[None]:
    """Only one build at a time; the lock ends with the process, however it ends."""
    with open(scratch / "lock", "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another build of this split is running (it holds {scratch / 'lock'})") from error
        yield


class LocalOutput:
    """A folder; records and files in the making are in a hidden folder inside."""

    def __init__(self, folder: Path, split: str) -> None:
        self._folder = folder
        self.work = f".{split}.build"
        self.scratch = folder / self.work

    def open(self) -> None:
        self.scratch.mkdir(parents=True, exist_ok=True)

    def names(self) -> list[str]:
        return [path.name for path in self._folder.iterdir() if path.is_file()]

    def work_names(self) -> list[str]:
        return [f"{self.work}/{path.name}" for path in self.scratch.glob("*.json")]

    def read(self, name: str) -> bytes | None:
        try:
            return (self._folder / name).read_bytes()
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes) -> None:
        temporary = self.scratch / f"{Path(name).name}.tmp"
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            self.finish(temporary, name)
        finally:
            temporary.unlink(missing_ok=True)

    def finish(self, temporary: Path, name: str) -> None:
        target = self._folder / name
        os.replace(temporary, target)
        descriptor = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def remove(self, name: str) -> None:
        (self._folder / name).unlink(missing_ok=True)

    def holds(self, name: str, size: int, sha256: str) -> bool:
        path = self._folder / name
        return path.is_file() and path.stat().st_size == size and file_sha256(path) == sha256


class RemoteOutput:
    """A URL. Shards are made in a local scratch folder, one for each worker at a time, and uploaded when complete.

    The records go to the store as well, so that another machine can go on. The scratch folder lies where Python puts
    temporary files (`TMPDIR`) under a name that is the same for every build of this split: what a killed build left
    there is found and removed by the next one, and two builds on one machine exclude each other.
    """

    def __init__(self, url: str, split: str) -> None:
        self._url = url
        self._filesystem, self._root = open_url(url)
        self.work = f".{split}.build"
        digest = hashlib.sha256(f"{url}\n{split}".encode()).hexdigest()[:16]
        self.scratch = Path(tempfile.gettempdir()) / f"visft_ds-build-{os.getuid()}-{digest}"
        self._atomic = url.partition("://")[0].lower() in _OBJECT_STORES
        self._sizes: dict[str, int] = {}

    def open(self) -> None:
        self.scratch.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.scratch.stat().st_uid != os.getuid():
            raise ValueError(f"{self.scratch} belongs to somebody else; set TMPDIR to a folder of your own")
        with readable_errors(self._url):
            if not self._atomic:
                self._filesystem.makedirs(f"{self._root}/{self.work}", exist_ok=True)
            self._filesystem.invalidate_cache()
            listing = self._filesystem.find(self._root, maxdepth=2, detail=True)
        prefix = self._root.rstrip("/") + "/"
        self._sizes = {path.removeprefix(prefix): int(entry["size"]) for path, entry in listing.items()}

    def names(self) -> list[str]:
        return [name for name in self._sizes if "/" not in name]

    def work_names(self) -> list[str]:
        return [name for name in self._sizes if name.startswith(f"{self.work}/") and name.endswith(".json")]

    def read(self, name: str) -> bytes | None:
        if name not in self._sizes:
            return None
        with readable_errors(self._place(name)):
            data: bytes = self._filesystem.cat_file(self._path(name))
        return data

    def write(self, name: str, data: bytes) -> None:
        path = self._path(name)
        with readable_errors(self._place(name)):
            self._filesystem.pipe_file(path if self._atomic else self._temporary(name), data)
            if not self._atomic:
                self._filesystem.mv(self._temporary(name), path)
        self._sizes[name] = len(data)

    def finish(self, temporary: Path, name: str) -> None:
        path = self._path(name)
        with readable_errors(self._place(name)):
            self._filesystem.put_file(str(temporary), path if self._atomic else self._temporary(name))
            if not self._atomic:
                self._filesystem.mv(self._temporary(name), path)
        self._sizes[name] = temporary.stat().st_size
        temporary.unlink()

    def remove(self, name: str) -> None:
        if self._sizes.pop(name, None) is not None:
            with readable_errors(self._place(name)):
                self._filesystem.rm_file(self._path(name))

    def holds(self, name: str, size: int, sha256: str) -> bool:
        return self._sizes.get(name) == size

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _place(self, name: str) -> str:
        return f"{self._url}/{name}"

    def _temporary(self, name: str) -> str:
        return f"{self._root}/{self.work}/{Path(name).name}.upload"
