"""The run folder: its lock, and what a new start finds in it. No run overwrites another."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from visft_ds.config import ResolvedConfig
from visft_ds.config.record import RunFile, differences, read_run
from visft_ds.config.resolve import identity_of
from visft_ds.files import reading
from visft_ds.run_files import (
    EXPORT,
    EXPORT_RECORD_FILE,
    LOCK_FILE,
    METRICS_FILE,
    RECORD_FILE,
    named_steps,
    saved_something,
)

#: What a start leaves that ended before its record was written.
_OF_A_START = {EXPORT, "features", METRICS_FILE, LOCK_FILE, "tensorboard"}
_MOST_DIFFERENCES = 12  #: that an error lists
_SILENCE = 1.0  #: seconds of waiting for the lock that need no word


@dataclass(frozen=True)
class EarlierStarts:
    """Remains of earlier starts of a run in its folder."""

    record: RunFile | None = None  #: None: they saved nothing that a start could continue
    steps: frozenset[int] = frozenset()  #: of the checkpoints that are there, by their names
    exported: bool = False  #: the result is whole


def look_into(out: Path) -> EarlierStarts:
    """Look into a run folder. Raises ValueError as `read_run` where something was saved."""
    record = read_run(out) if saved_something(out) else None
    exported = (out / EXPORT / EXPORT_RECORD_FILE).is_file()
    return EarlierStarts(record, frozenset(named_steps(out)), exported)


def open_run_folder(out: Path, config: ResolvedConfig, resume: str) -> EarlierStarts:
    """Look into `out` and check that a run may write there. Reads only, so every rank can do it.

    Args:
        resume: "auto" continues a run of the same settings, "must" needs one, "no" wants a fresh folder.

    Raises:
        ValueError: a folder of other things, a run of other settings (twelve are named), or a run in the way.
            A run that neither saved nor recorded a step is not in the way.
    """
    earlier = look_into(out)
    if resume == "must" and earlier.record is None:
        raise ValueError(f"--resume must: no run in {out} has saved anything; use --resume auto to start one")
    if not (out / RECORD_FILE).is_file():
        others = sorted({path.name for path in out.glob("[!.]*")} - _OF_A_START)
        if others:
            raise ValueError(
                f"{out} holds no run but other files ({', '.join(others[:8])}); choose another --out"
            )
        return earlier
    metrics = out / METRICS_FILE
    recorded_steps = metrics.is_file() and metrics.stat().st_size > 0
    if earlier.record is None and not recorded_steps:
        return earlier
    if resume == "no":
        raise ValueError(
            f"--resume no: {out} holds a run; choose another --out, or --resume auto to continue it"
        )
    with reading(out / RECORD_FILE, "the record of a run"):
        there = identity_of((earlier.record or read_run(out)).config)
    lines = differences(there, config)
    if lines:
        listed = "".join(f"  {line}\n" for line in lines[:_MOST_DIFFERENCES])
        raise ValueError(
            f"{out} holds a run with other settings, {len(lines)} in all (there -> here):\n{listed}"
            "choose another --out, give the settings of that run, or start from it with other ones: "
            f"visft train --from {out}"
        )
    return earlier


@contextlib.contextmanager
def locked(out: Path, patience: float = 30.0) -> Iterator[None]:
    """Lock `out` for this process, and make it if it is missing; one process of a run does it for all.

    Args:
        patience: seconds to wait for another process, such as a run that was asked to stop.

    Raises:
        ValueError: a folder that cannot be written, or one that another process keeps locked.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(out / LOCK_FILE)
    try:
        out.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=min(patience, _SILENCE))
        except Timeout:
            text = f"waiting for {out / LOCK_FILE}: another run uses {out}; giving up in {patience:.0f} s"
            print(text, file=sys.stderr, flush=True)
            lock.acquire(timeout=patience)
    except Timeout as error:
        raise ValueError(
            f"{out} is in use by another run: wait for it, stop it, or choose another --out"
        ) from error
    except OSError as error:
        raise ValueError(
            f"{out} cannot be written: {error.strerror}; choose another --out, or fix it"
        ) from error
    except NotImplementedError:
        print(f"warning: {out} has no locks: a second run could use it, too", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        lock.release()


def refuse_filled(out: Path) -> None:
    """Raise ValueError for a folder of results that is not new or empty."""
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ValueError(
            f"{out} is not empty, and nothing is overwritten: choose another --out, or remove it"
        )
