"""The run folder belongs to one run at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from visft_ds.run.folder import LOCK_FILE

#: Seconds to wait for another process to let go of the folder: a run that was asked to stop is given as much.
LOCK_PATIENCE = 30.0
#: What file systems answer that have no locks (Lustre without -o flock, some FUSE file systems).
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


@contextlib.contextmanager
def locked(out: Path, patience: float = LOCK_PATIENCE) -> Iterator[None]:
    """Keep `out` for this process; one process of a run does it for all. Makes the folder.

    A POSIX record lock: the kernel lets go of it when the process ends, however it ends, and children do not inherit
    it. NFS keeps it across machines (version 3 with its lock service, version 4 by itself); where a file system has no
    locks, a warning says so and nothing is kept. (filelock would do, from 3.32 on: before, who waits empties the file
    that names the holder, and a forked child keeps the lock of a killed parent.)

    Raises:
        ValueError: a folder that cannot be written, or another process that does not let go in time; it is named.
    """
    with contextlib.ExitStack() as stack:
        try:
            out.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(out / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
            stack.callback(os.close, descriptor)
            _lock(descriptor, out, patience)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        except OSError as error:
            raise ValueError(f"{out} cannot be written: {error.strerror}; choose another --out, or mend it") from error
        yield


def _lock(descriptor: int, out: Path, patience: float) -> None:
    deadline, told = time.monotonic() + patience, False
    while True:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno in _NO_LOCKS:
                _tell(f"warning: {out} has no locks ({error.strerror}): nothing keeps a second run out")
                return
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
        holder = os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
        if time.monotonic() > deadline:
            raise ValueError(f"{out} is in use by another run, {holder}: wait for it, stop it, or choose another --out")
        if not told:
            _tell(f"{holder} still writes into {out}; waiting up to {patience:.0f} s for it")
            told = True
        time.sleep(0.2)


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
