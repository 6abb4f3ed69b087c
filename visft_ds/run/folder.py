"""The run folder: its lock, its record run.json, and what a new start finds in it. No run overwrites
another.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field

from visft_ds.config import ResolvedConfig, resolve
from visft_ds.config.preflight import EXPORT_RECORD_FILE, RECORD_FILE
from visft_ds.config.resolve import differences, identity_of
from visft_ds.files import read_bytes, reading
from visft_ds.monitor.metrics import METRICS_FILE
from visft_ds.settings.fields import Count, Positive, StrictModel

#: What a run leaves in <run>/export, beside heads and a copy of its record: its base (if it was random), a
#: backbone that was trained itself, the adapter.
BACKBONE_FILE, TRAINED_BACKBONE_FILE = "backbone.safetensors", "trained_backbone.safetensors"
ADAPTER_FOLDER = "adapter"
LOCK_FILE = "run.lock"
RUN_SCHEMA = 3  #: version of the record
#: What a start leaves that ended before its record was written.
_OF_A_START = {"export", "features", METRICS_FILE, LOCK_FILE, "tensorboard"}
_MOST_BYTES = 1 << 26  #: of a run.json that is read
_SILENCE = 1.0  #: seconds of waiting for the lock that need no word


class Parent(StrictModel):
    """Origin of a run: a checkpoint of another one, or an adapter."""

    path: str
    step: Count | None
    sha256: str  #: of what was read


class RunFile(StrictModel):
    """Content of run.json; its number is that of its schema."""

    number: Count = Field(alias="schema")
    config: dict[str, Any]
    world_size: Positive = 1
    started: str = ""
    command: list[str] = Field(default_factory=list)
    versions: dict[str, str] = Field(default_factory=dict)
    commit: str = ""  #: of the checkout, with "-dirty" where files differ from it; empty where it is none
    identity: dict[str, str] = Field(default_factory=dict)  #: fingerprints of what it was made with
    parent: Parent | None = None


def open_run_folder(out: Path, config: ResolvedConfig, resume: str) -> None:
    """Check that a run may write into `out`. Reads only, so every rank can do it.

    Args:
        resume: "auto" continues a run of the same settings, "must" needs one, "no" wants a fresh folder.

    Raises:
        ValueError: a folder of other things, a run of other settings (twelve are named), or a run in the way.
            A run that neither saved nor recorded a step is not in the way.
    """
    saved, metrics = saved_something(out), out / METRICS_FILE
    if resume == "must" and not saved:
        raise ValueError(f"--resume must: no run in {out} has saved anything; use --resume auto to start one")
    if not (out / RECORD_FILE).is_file():
        if others := sorted({path.name for path in out.glob("[!.]*")} - _OF_A_START):
            raise ValueError(
                f"{out} holds no run but other files ({', '.join(others[:8])}); choose another --out"
            )
        return
    if not saved and not (metrics.is_file() and metrics.stat().st_size):
        return
    if resume == "no":
        raise ValueError(
            f"--resume no: {out} holds a run; choose another --out, or --resume auto to continue it"
        )
    with reading(out / RECORD_FILE, "the record of a run"):
        there = identity_of(read_run(out).config)
    if listed := differences(there, config):
        lines = "".join(f"  {line}\n" for line in listed[:12])
        found = f"{out} holds a run with other settings, {len(listed)} in all (there -> here):\n{lines}"
        raise ValueError(f"{found}choose another --out, or give the settings of that run")


def export_of(run: Path) -> Path:
    """The folder of what a run has exported or will export; an export is its own."""
    return run if (run / EXPORT_RECORD_FILE).is_file() else run / "export"


def saved_something(out: Path) -> bool:
    """Return True if a run in `out` has left a checkpoint, damaged ones too, or a whole export."""
    checkpoints = (path for path in (out / "checkpoints").glob("step_*") if path.suffix != ".tmp")
    exported = (out / "export" / EXPORT_RECORD_FILE).is_file()
    return (out / RECORD_FILE).is_file() and (exported or any(True for _ in checkpoints))


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


def recorded_config(out: Path) -> ResolvedConfig:
    """The resolved configuration of the run in `out`. Raises ValueError as `read_run`."""
    return resolve(whole=(read_run(out).config, str(out / RECORD_FILE)))


def read_run(out: Path) -> RunFile:
    """The record of the run, or of the export, in `out`. Raises ValueError: none there, or one of another
    schema.
    """
    record = out / (EXPORT_RECORD_FILE if (out / EXPORT_RECORD_FILE).is_file() else RECORD_FILE)
    if not record.is_file():
        raise ValueError(f"there is no run in {out}: {record} does not exist")
    with reading(record, "the record of a run"):
        data = read_bytes(record, _MOST_BYTES)
        if (schema := json.loads(data)["schema"]) != RUN_SCHEMA:
            raise ValueError(f"schema {schema}; this release reads {RUN_SCHEMA}")
        return RunFile.model_validate_json(data)


def refuse_filled(out: Path) -> None:
    """Raise ValueError for a folder of results that is not new or empty."""
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ValueError(
            f"{out} is not empty, and nothing is overwritten: choose another --out, or remove it"
        )


def named_steps(out: Path) -> set[int]:
    """Steps of the checkpoints of the run in `out` by their names, which they get when they are whole."""
    names = [path.name[5:] for path in (out / "checkpoints").glob("step_*")]
    return {int(name) for name in names if name.isdigit()}
