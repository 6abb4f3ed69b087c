"""The local folder that a conversion writes to. A file bears its final name only when it is complete."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from visft_ds.config.preflight import is_url
from visft_ds.files import sync_folder
from visft_ds.redaction import redacted


class Output:
    """The folder of a split; records and files in the making are in the hidden folder `work` inside.

    Names are relative to the folder, those of records begin with `work/`.

    Raises ValueError for a URL.
    """

    def __init__(self, place: Path | str, split: str) -> None:
        if is_url(place):
            raise ValueError(
                f"--out {redacted(place)}: writing to URLs was removed in 0.2: build into a folder, then copy it with "
                "`aws s3 sync`, `rclone copy` or the like; training reads it there"
            )
        self._folder = Path(place)
        self.work = f".{split}.build"  #: name of the hidden folder
        self.scratch = self._folder / self.work  #: for files in the making, for one build at a time

    def open(self) -> None:
        """Make the folders."""
        self.scratch.mkdir(parents=True, exist_ok=True)

    def names(self) -> list[str]:
        """Names of the files in the folder itself."""
        return [path.name for path in self._folder.iterdir() if path.is_file()]

    def work_names(self) -> list[str]:
        """Names of the records."""
        return [f"{self.work}/{path.name}" for path in self.scratch.glob("*.json")]

    def read(self, name: str) -> bytes | None:
        """A whole file, or None if there is none."""
        try:
            return (self._folder / name).read_bytes()
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes) -> None:
        """Write a small file atomically."""
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
        """Move a complete file to its final name."""
        target = self._folder / name
        os.replace(temporary, target)
        sync_folder(target.parent)

    def remove(self, name: str) -> None:
        """Delete a file if it is there."""
        (self._folder / name).unlink(missing_ok=True)

    def holds(self, name: str, size: int, sha256: str) -> bool:
        """Return True if a file exists with this size in bytes and this SHA-256 digest."""
        path = self._folder / name
        if not path.is_file() or path.stat().st_size != size:
            return False
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == sha256


@contextmanager
def exclusive(scratch: Path) -> Iterator[None]:
    """Lock the folder for one build at a time; the lock ends with the process, however it ends. Raises ValueError."""
    with open(scratch / "lock", "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another build of this split is running (it holds {scratch / 'lock'})") from error
        yield
