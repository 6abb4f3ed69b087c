"""Records of a run: metrics.jsonl, TensorBoard event files and run.json, in the run folder.

Losing a record must not lose a run: a writer that fails prints one warning and training goes on.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from visft_ds.config.fields import StrictModel
from visft_ds.config.records import Natural, Whole, read_record
from visft_ds.monitor.callbacks import Callback
from visft_ds.redaction import redacted, redacted_values

#: Packages whose version decides results.
RECORDED_PACKAGES = ("visft_ds", "torch", "deepspeed", "numpy", "torchvision", "safetensors")

METRICS_FILE = "metrics.jsonl"
_BLOCK = 1 << 20  #: bytes of it that are read at once, from its end
RUN_SCHEMA = 2  #: version of run.json
#: What a full disk, a missing package or TensorBoard's writer thread raise; anything else is a mistake of ours.
_WRITER_ERRORS = (OSError, ImportError, ValueError, RuntimeError)


class MetricsWriter:
    """Appends to OUT/metrics.jsonl (one object per step or event, on disk after each call) and OUT/tensorboard/.

    Args:
        out_dir: the run folder; made if absent.
        resume_step: optimiser steps already done. Later records of an interrupted run are removed from metrics.jsonl
            and hidden in TensorBoard, so that each step stands there once; 0 starts afresh.
        enabled: False on every process but the main one: nothing is written.
        callbacks: called with each record after it was written.
    """

    def __init__(
        self,
        out_dir: str | Path,
        *,
        resume_step: int = 0,
        enabled: bool = True,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.path = Path(out_dir) / METRICS_FILE
        self.enabled = enabled
        self.last: dict[str, float] = {}  #: the newest number of each name, those of an interrupted run included
        self._callbacks = callbacks if enabled else ()
        self._warned: set[str] = set()
        self._torn = False
        self._events: Any = None
        if enabled:
            self._attempt("metrics.jsonl", lambda: self.last.update(truncate_metrics(self.path, resume_step)))
            self._attempt("TensorBoard", lambda: self._open_tensorboard(Path(out_dir) / "tensorboard", resume_step))

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of one optimiser step, e.g. {"loss/detection": 1.2, "lr/lora": 1e-5}; step counts from 1."""
        self._numbers("step", step, values)
        for callback in self._callbacks:
            callback.on_step(step, values)

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Numbers of the evaluation after `step`, e.g. {"box/AP": 0.3}; recorded with "val/" before their names."""
        self._numbers("step", step, {f"val/{name}": value for name, value in metrics.items()})
        for callback in self._callbacks:
            callback.on_evaluation(step, metrics)

    def save(self, step: int, seconds: Mapping[str, float], folder: Path) -> None:
        """Times of the checkpoint of `step`, which lies in `folder`."""
        self._numbers("save", step, seconds)
        for callback in self._callbacks:
            callback.on_save(step, folder)

    def event(self, step: int, event: str, **details: Any) -> None:
        """Something that happened in `step`: "bad step", "loss scale"; details are JSON values."""
        self._write({"kind": "event", "step": step, "event": event, **details})

    def image(self, step: int, tag: str, image: npt.NDArray[np.uint8]) -> None:
        """An image (H, W, 3) RGB for TensorBoard."""
        if self._events is not None:
            self._attempt("TensorBoard", lambda: self._events.add_image(tag, image, step, dataformats="HWC"))

    def text(self, step: int, tag: str, text: str) -> None:
        """A text for TensorBoard, which reads it as Markdown."""
        if self._events is not None:
            self._attempt("TensorBoard", lambda: self._events.add_text(tag, text, step))

    def close(self) -> None:
        """Flush and close; calling it again does nothing."""
        if self._events is not None:
            self._attempt("TensorBoard", self._events.close)
            self._events = None

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open_tensorboard(self, folder: Path, resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes a second, which readers of this module need not wait

        # TensorBoard hides what earlier files hold from this step on.
        self._events = SummaryWriter(str(folder), purge_step=resume_step + 1, flush_secs=10)

    def _numbers(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        self._write({"kind": kind, "step": step, **values})
        if self.enabled and kind == "step":
            self.last.update(values)
        if self._events is not None:
            self._attempt("TensorBoard", lambda: self._add_scalars(step, values))

    def _add_scalars(self, step: int, values: Mapping[str, float]) -> None:
        for tag, value in values.items():
            self._events.add_scalar(tag, value, step)

    def _write(self, record: dict[str, Any]) -> None:
        if self.enabled:
            line = json.dumps(
                {key: _json_value(value) for key, value in record.items()} | {"time": round(time.time(), 3)}
            )
            self._attempt("metrics.jsonl", lambda: self._append(line))

    def _append(self, line: str) -> None:
        # A line that a full disk cut off must not swallow the next one.
        text = ("\n" if self._torn else "") + line + "\n"
        self._torn = True
        with self.path.open("ab") as file:
            file.write(text.encode())
        self._torn = False

    def _attempt(self, what: str, action: Callable[[], None]) -> None:
        try:
            action()
        except _WRITER_ERRORS as error:
            if what not in self._warned:
                print(f"warning: {what} is not being written: {error}; training goes on", file=sys.stderr, flush=True)
            self._warned.add(what)


def _json_value(value: Any) -> Any:
    """NaN and infinity as texts, since JSON has no such numbers and a diverged loss must stay visible."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(path: Path, having: str = "") -> Iterator[dict[str, Any]]:
    """Records of a metrics.jsonl in order; a line torn by a crash or a full disk is left out.

    Args:
        having: only those with this in their text, such as "val/"; the others need not be parsed.
    """
    wanted = having.encode()
    with path.open("rb") as file:
        for line in file:
            if wanted in line and (record := _record(line)) is not None:
                yield record


def truncate_metrics(path: Path, step: int) -> dict[str, float]:
    """Keep the records up to and including `step`, reading back from the end no further than that; makes the folder.

    Returns the newest number of each name among those that it has seen.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        return {}
    kept: list[tuple[bytes, dict[str, Any]]] = []  # the newest first
    with path.open("r+b") as file:
        position, rest, keep = file.seek(0, 2), b"", 0
        while position and not keep:
            size = min(_BLOCK, position)
            position -= size
            file.seek(position)
            lines = (file.read(size) + rest).split(b"\n")
            rest = lines.pop(0) if position else b""
            before = position + (len(rest) + 1 if position else 0) + sum(len(line) + 1 for line in lines)
            for line in reversed(lines):
                before -= len(line) + 1
                record = _record(line)
                if record is None or record["step"] > step:
                    continue
                kept.append((line, record))
                if record["kind"] == "step" and not any(name.startswith("val/") for name in record):
                    keep = before  # numbers of evaluations and saves come late; what is before this line is older
                    break
        file.seek(keep)
        file.truncate()
        file.write(b"".join(line + b"\n" for line, _ in reversed(kept)))
    numbers = [record for _, record in reversed(kept) if record["kind"] == "step"]
    return {
        name: float(value)
        for record in numbers
        for name, value in record.items()
        if name not in ("kind", "step", "time")
    }


def _record(line: bytes) -> dict[str, Any] | None:
    """A line as a record; None for one that is torn."""
    try:
        record = json.loads(line)
        whole = isinstance(record, dict) and isinstance(record["kind"], str) and type(record["step"]) is int
    except (ValueError, KeyError, RecursionError):
        return None
    return record if whole else None


def _replace(path: Path, text: str) -> None:
    """Write a file in one move: a power failure leaves the old one or the new one, never an empty one."""
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class Revision(StrictModel):
    """Commit of the checkout that a run was started from."""

    commit: str
    modified: bool


class FileInput(StrictModel):
    """File that a run was given."""

    path: str
    beside: str
    sha256: str


class SplitInput(StrictModel):
    """Shards that a run was given."""

    path: str
    beside: str
    split: str
    fingerprint: str
    masks: str | None = None  #: how they were made, where they were not given


class Parent(StrictModel):
    """Origin of a run: a checkpoint of another one, or an adapter."""

    path: str
    beside: str  #: the way to it from the run
    step: Whole | None
    sha256: str  #: of what was read


class RunFile(StrictModel):
    """Content of OUT/run.json; its number is that of its schema."""

    number: Whole = Field(alias="schema")
    config: dict[str, Any]
    world_size: Natural = 1
    started: str = ""
    command: list[str] = Field(default_factory=list)
    versions: dict[str, str] = Field(default_factory=dict)
    git: Revision | None = None
    inputs: dict[str, FileInput | SplitInput] = Field(default_factory=dict)
    parent: Parent | None = None
    earlier: list[dict[str, Any]] = Field(default_factory=list)


@dataclass(frozen=True)
class RunRecord:
    """Record of a run, its settings and its environment: OUT/run.json."""

    config: Mapping[str, Any]  #: the resolved configuration
    world_size: int
    command: Sequence[str]
    inputs: Mapping[str, Any] = field(default_factory=dict)  #: where its files are and what proves them
    parent: Mapping[str, Any] | None = None  #: what it began with, as `Parent`; None: nothing

    def write(self, out_dir: str | Path) -> Path:
        """Write OUT/run.json in one move. An earlier record (the run was resumed) is kept under "earlier"."""
        path = Path(out_dir) / "run.json"
        record = {
            "schema": RUN_SCHEMA,
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "command": [redacted(word) for word in self.command],
            "world_size": self.world_size,
            "versions": versions(),
            "git": git_revision(Path(__file__).resolve().parents[2]),
            "config": redacted_values(self.config),
            "inputs": dict(self.inputs),
            "earlier": [],
        }
        if path.is_file():
            previous = read_record(path, RunFile).model_dump(mode="json", by_alias=True, exclude_unset=True)
            record["earlier"] = [*previous.pop("earlier", []), previous]
        record |= {} if self.parent is None else {"parent": self.parent}
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, json.dumps(record, indent=2) + "\n")
        return path


def versions() -> dict[str, str]:
    """Versions of Python, the system and the packages that decide results; absent packages are left out."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in RECORDED_PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_revision(folder: Path) -> dict[str, Any] | None:
    """Commit of the checkout at `folder` and whether files differ from it; None where it is no checkout."""
    if not (folder / ".git").exists():
        return None
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return {"commit": commit, "modified": bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
