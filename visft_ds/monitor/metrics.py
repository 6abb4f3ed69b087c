"""metrics.jsonl and TensorBoard of a run. Losing a record must not lose a run: a failing writer warns
once.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from visft_ds import __version__, importing
from visft_ds.run_files import METRICS_FILE

#: Function of a step and of numbers by name; True ends the run.
Callback = Callable[[int, Mapping[str, float]], object]
CONCLUSION = "training images evaluated"  #: the last event of a run that evaluates
_BLOCK = 1 << 20  #: bytes of it that are read at once, from its end
#: Packages whose versions decide results: what computes, decodes pictures, and measures AP.
_PACKAGES = (
    "torch",
    "deepspeed",
    "numpy",
    "torchvision",
    "timm",
    "safetensors",
    "simplejpeg",
    "faster-coco-eval",
    "pycocotools",
)


#: First part of a name in metrics.jsonl -> the group of TensorBoard that shows it; others are their own.
_GROUPS = {
    "loss": "losses",
    "val": "metrics",
    "lr": "optimizer/lr",
    "grad_norm": "optimizer/grad_norm",
    "loss_scale": "optimizer/loss_scale",
    "skipped": "optimizer/skipped",
    "images_per_second": "speed/images_per_second",
    "data_wait_seconds": "speed/data_wait_seconds",
    "save": "speed/save",
}


def tag_of(name: str) -> str:
    """Name in TensorBoard, "group/...", of a number in metrics.jsonl."""
    first, slash, rest = name.partition("/")
    return f"{_GROUPS.get(first, first)}{slash}{rest}"


@dataclass
class MetricsWriter(AbstractContextManager["MetricsWriter"]):
    """Appends one JSON object per step or event to OUT/metrics.jsonl, and the same numbers to
    OUT/tensorboard/, there in groups: losses, memory, metrics, optimizer, speed; and predictions.
    """

    out: Path  #: the run folder
    resume_step: int = 0  #: optimiser steps already done; later records of an interrupted run are removed
    enabled: bool = True  #: False on every process but the main one: nothing is written
    #: called with the numbers of each step and evaluation after they were written
    callbacks: Sequence[Callback] = ()

    def __post_init__(self) -> None:
        self.path = self.out / METRICS_FILE
        #: The newest number of each name, those of an interrupted run included.
        self.last: dict[str, float] = {}
        self.evaluated: set[int] = set()  #: evaluated steps among the newest records of an interrupted run
        self.concluded = False  #: the last number of the run has been written
        self.ends_run = False  #: a callback has returned True
        self._warned: set[str] = set()
        self._events: Any = None  # the SummaryWriter of TensorBoard
        self._ended: Any = None  # what tells its HParams tab that the run has ended
        if not self.enabled:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        with self._attempt(METRICS_FILE):
            if self.path.is_file():
                self._take_up(truncate_metrics(self.path, self.resume_step))
        with self._attempt("TensorBoard"):
            # Takes a second, which readers of this module save.
            with importing():
                from torch.utils.tensorboard import SummaryWriter

            folder = str(self.out / "tensorboard")
            self._events = SummaryWriter(folder, purge_step=self.resume_step + 1, flush_secs=10)

    def _take_up(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Go on after the newest records of an interrupted run."""
        for record in records:
            if record["kind"] == "step":
                names = record.keys() - {"kind", "step", "time"}
                self.last |= {name: float(record[name]) for name in names}
            if is_evaluation(record):
                self.evaluated.add(record["step"])
            if record.get("event") == CONCLUSION:
                self.concluded = True

    def describe(self, text: str, settings: Mapping[str, Any], metrics: Sequence[str]) -> None:
        """Show the configuration in TensorBoard: as text, and as what its HParams tab compares runs by.

        Args:
            text: of the whole configuration.
            settings: numbers and texts by name.
            metrics: names in metrics.jsonl of the numbers whose last values stand beside the settings.
        """
        indented = "".join(f"    {line}\n" for line in text.splitlines())  # code, in Markdown
        self._show("add_text", "configuration", indented)
        if self._events is None:
            return
        with self._attempt("TensorBoard"):
            from torch.utils.tensorboard.summary import hparams

            *begin, self._ended = hparams(dict(settings), {tag_of(name): 0.0 for name in metrics})
            for summary in begin:
                self._events.file_writer.add_summary(summary)

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Record an optimiser step, e.g. {"loss/detection": 1.2, "lr/lora": 1e-5}; step counts from 1."""
        self._numbers("step", step, values)

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the evaluation after `step`, e.g. {"box/AP": 0.3}, with "val/" before the names."""
        self._numbers("step", step, {f"val/{name}": value for name, value in metrics.items()})

    def save(self, step: int, seconds: Mapping[str, float]) -> None:
        """Record times in seconds of the checkpoint of `step`."""
        self._numbers("save", step, seconds)

    def event(self, step: int, event: str, **details: Any) -> None:
        """Record something that happened in `step`, such as a "bad step"; details are JSON values."""
        self._append({"kind": "event", "step": step, "event": event, **details})

    def image(self, step: int, tag: str, image: npt.NDArray[np.uint8]) -> None:
        """Show an image (H, W, 3) RGB in TensorBoard, among the predictions."""
        self._show("add_image", f"predictions/{tag}", image, step, dataformats="HWC")

    def evaluations(self) -> list[dict[str, Any]]:
        """Records of all evaluations of the run, those of earlier starts included, in order."""
        if not self.path.is_file():
            return []
        return [record for record in read_metrics(self.path, "val/") if is_evaluation(record)]

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self._ended is not None:
            with self._attempt("TensorBoard"):
                self._events.file_writer.add_summary(self._ended)
        self._show("close")

    def _numbers(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        self._append({"kind": kind, "step": step, **values})
        for name, value in values.items():
            self._show("add_scalar", tag_of(name), value, step)
        if self.enabled and kind == "step":
            self.last.update(values)
            for callback in self.callbacks:
                answer = callback(step, values)
                if isinstance(answer, bool | np.bool_) and answer:  # any other value may be an accident
                    self.ends_run = True

    def _append(self, record: dict[str, Any]) -> None:
        if not self.enabled:
            return
        record["time"] = round(time.time(), 3)
        for name, value in record.items():
            # NaN and infinity as texts: JSON has no such numbers, and a diverged loss must stay visible.
            if isinstance(value, float) and not math.isfinite(value):
                record[name] = str(value)
        with self._attempt(METRICS_FILE), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def _show(self, method: str, *arguments: Any, **named: Any) -> None:
        if self._events is not None:
            with self._attempt("TensorBoard"):
                getattr(self._events, method)(*arguments, **named)

    @contextmanager
    def _attempt(self, what: str) -> Iterator[None]:
        try:
            yield
        except (OSError, ImportError, ValueError, RuntimeError) as error:  # others are mistakes of ours
            if what not in self._warned:
                text = f"warning: {what} is not being written: {error}; training continues"
                print(text, file=sys.stderr, flush=True)
            self._warned.add(what)


def read_metrics(path: Path, having: str = "") -> Iterator[dict[str, Any]]:
    """Records of a metrics.jsonl in order that have a text such as "val/" in them; torn lines are left
    out.
    """
    with path.open("rb") as file:
        for line in file:
            record = _record(line) if having.encode() in line else None
            if record is not None:
                yield record


def truncate_metrics(path: Path, step: int) -> list[dict[str, Any]]:
    """Keep the records up to and including `step`, reading back from the end no further than that.

    Returns the newest of these records, at least those since the last step that was trained: numbers of
    evaluations and saves come late, and everything before the record of a trained step is older.
    """
    with path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        start = end
        size = _BLOCK
        newest: list[dict[str, Any]] = []
        while start > 0 and not any(_is_training(record) for record in newest):
            start = max(0, end - size)
            size *= 2
            file.seek(start)
            lines = file.read(end - start).split(b"\n")
            if start > 0:
                start += len(lines.pop(0)) + 1  # it begins before the block
            records = [_record(line) for line in lines]
            newest = [record for record in records if record is not None and record["step"] <= step]
        file.seek(start)
        file.truncate()
        file.write("".join(json.dumps(record) + "\n" for record in newest).encode())
    return newest


def is_evaluation(record: Mapping[str, Any]) -> bool:
    """Return True for the numbers of an evaluation."""
    return any(name.startswith("val/") for name in record)


def _is_training(record: Mapping[str, Any]) -> bool:
    """Return True for the numbers of a trained step."""
    return record["kind"] == "step" and not is_evaluation(record)


def _record(line: bytes) -> dict[str, Any] | None:
    """A line as a record; None for one that is torn."""
    try:
        record = json.loads(line)
        return record if isinstance(record["kind"], str) and type(record["step"]) is int else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def versions() -> dict[str, str]:
    """Versions of Python, the system and the packages that decide results."""
    packages = {name: importlib.metadata.version(name) for name in _PACKAGES}
    system = {"python": platform.python_version(), "platform": platform.platform()}
    return {**system, "visft_ds": __version__, **packages}
