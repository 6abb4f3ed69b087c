"""Files and folders of checkpoints: what is on disk for good, and what a crash leaves behind.

Each change goes through one function of `os`: a test can end the process, fill the disk or cut the power at every one.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

#: Bytes that are hashed and written in one go: still in the processor's cache when they are written.
_PIECE = 1 << 22


def write_file(path: Path, pieces: Iterable[bytes | memoryview]) -> str:
    """Write a new file and wait until it is on disk; returns the sha256 of what was meant to be written.

    Both hashing and writing let other threads work: this may run beside a training step.

    Raises:
        OSError: a full disk, a read-only folder, a file that is there already.
    """
    digest = hashlib.sha256()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        for piece in pieces:
            view = memoryview(piece)
            for start in range(0, len(view), _PIECE):
                part = view[start : start + _PIECE]
                digest.update(part)
                while part:  # a write may take less than it was given
                    part = part[os.write(descriptor, part) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return digest.hexdigest()


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
        free = f"{shutil.disk_usage(folder).free / 1e6:,.1f} MB free" if folder.is_dir() else "no such folder"
        raise OSError(f"{what} cannot be written to {folder} ({free}): {error.strerror or error}. {then}") from error
