"""Files and folders of checkpoints: what is on disk for good, and what a crash leaves behind.

Each change goes through one function of `os`: a test can end the process, fill the disk or cut the power at every one.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

#: Bytes that are hashed and written in one go: still in the processor's cache when they are written.
_PIECE = 1 << 22


@dataclass(frozen=True)
class Written:
    """A file that is completely on disk."""

    sha256: str  #: of what was meant to be written, not of what a faulty disk gives back
    bytes: int


def write_file(path: Path, pieces: Iterable[bytes | memoryview]) -> Written:
    """Write a new file and wait until it is on disk.

    Both hashing and writing let other threads work: this may run beside a training step.

    Raises:
        OSError: a full disk, a read-only folder, a file that is there already.
    """
    digest, size = hashlib.sha256(), 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        for piece in pieces:
            view = memoryview(piece)
            for start in range(0, len(view), _PIECE):
                part = view[start : start + _PIECE]
                digest.update(part)
                size += len(part)
                while part:  # a write may take less than it was given
                    part = part[os.write(descriptor, part) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return Written(digest.hexdigest(), size)


def remove_folder(path: Path, waste: Path) -> None:
    """Delete a folder with everything in it: renamed to `waste` first, so that half of it never bears its name."""
    os.replace(path, waste)
    shutil.rmtree(waste)


@contextlib.contextmanager
def explained(what: str, folder: Path, then: str) -> Iterator[None]:
    """Say in one line why something could not be written into a folder.

    Args:
        what: subject of the sentence.
        then: another sentence: where things stand, what to do.

    Raises:
        OSError: in place of one that names neither file nor remedy.
    """
    try:
        yield
    except OSError as error:
        raise OSError(f"{what} cannot be written to {folder}: {reason(error, folder, 0)}. {then}") from error


def reason(error: OSError, folder: Path, needed: int) -> str:
    """Why writing into a folder failed and what helps, in one line; `needed` bytes were to be written, 0: not known."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(folder).free if folder.is_dir() else 0
        wanted = f"{needed / 1e6:,.1f} MB needed, " if needed else ""
        return f"{error.strerror} ({wanted}{free / 1e6:,.1f} MB free); make room"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"{error.strerror}; make the folder writable"
    return f"{error.strerror or error}"
