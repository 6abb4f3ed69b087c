"""The run folder belongs to one run at a time."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from visft_ds.run.folder import LOCK_FILE

#: Seconds to wait for another process to let go of the folder: a run that was asked to stop is given as much.
LOCK_PATIENCE = 30.0


@contextlib.contextmanager
def locked(out: Path, patience: float = LOCK_PATIENCE) -> Iterator[None]:
    """Keep `out` for this process, however it ends; one process of a run does it for all. Makes the folder.

    Raises:
        ValueError: a folder that cannot be written, or another process that does not let go in time.
    """
    lock = FileLock(out / LOCK_FILE, timeout=patience)
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise ValueError(f"{out} is in use by another run: wait for it, stop it, or choose another --out") from error
    except OSError as error:
        raise ValueError(f"{out} cannot be written: {error.strerror}; choose another --out, or mend it") from error
    except NotImplementedError:
        print(f"warning: {out} has no locks: nothing keeps a second run out", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        lock.release()
