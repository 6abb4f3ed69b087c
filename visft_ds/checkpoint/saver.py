"""Asynchronous saving: a snapshot in host memory, a thread that writes it, and which checkpoints are kept.

Training stands still only while the state is copied to the host. One save is on its way at a time: the next
one waits for it. What goes wrong in the thread is raised in the training thread, at the next step or at the
end.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visft_ds.checkpoint.format import checkpoint_path, delete_checkpoint, save_checkpoint, saved_steps
from visft_ds.monitor.metrics import is_evaluation, read_metrics
from visft_ds.parallel.state import EngineState, ToHost

Scores = Mapping[int, float | None]  #: step -> the metric; None where the evaluation gave none


@dataclass(frozen=True)
class Retention:
    """Retention policy of checkpoints."""

    last: int  #: the newest so many
    best: str | None = None  #: and the best one by this metric of the validation split (more is better)

    def obsolete(
        self,
        steps: Sequence[int],
        newest: int,
        scores: Scores,
        to_be_judged: Callable[[int], bool],
    ) -> list[int]:
        """Steps to delete among those that have a checkpoint.

        Args:
            newest: the one just written. Newer ones (damaged, passed over by a resume) push nothing out and
            stay.
            scores: step -> the metric; None where the evaluation gave none.
            to_be_judged: whether a step is one that gets evaluated. Numbers come later than the next save.
        """
        older = [step for step in steps if step <= newest]
        remaining: set[int | None] = set(older[-self.last :])
        if self.best is not None:
            remaining.add(best_step({step: scores.get(step) for step in older}))
            last_judged = max(scores, default=-1)
            remaining |= {step for step in older if step > last_judged and to_be_judged(step)}
        return [step for step in older if step not in remaining]


def best_step(scores: Scores) -> int | None:
    """The step of the highest score, the earliest of equal ones; None where there is no number."""
    numbers = {step: score for step, score in scores.items() if score is not None}
    return max(numbers, key=lambda step: (numbers[step], -step), default=None)


def recorded_scores(path: Path, metric: str) -> dict[int, float | None]:
    """Step -> validation metric, out of the metrics.jsonl of a run; a record without that metric gives
    None.
    """
    records = read_metrics(path, "val/") if path.is_file() else ()
    evaluations = filter(is_evaluation, records)
    return {record["step"]: _number(record.get(f"val/{metric}")) for record in evaluations}


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


@dataclass(frozen=True)
class SaveReport:
    """Report of a finished save."""

    step: int
    #: for which training stood still: waiting for the save before, gathering, copying to the host
    stall_seconds: float
    write_seconds: float  #: writing, beside the training


@dataclass
class Saver(AbstractContextManager["Saver"]):
    """Saves of one run; a context manager that lets none get lost at the end."""

    folder: Path  #: <run>/checkpoints
    identity: Mapping[str, Any]  #: see `save_checkpoint`
    retention: Retention
    to_be_judged: Callable[[int], bool] = lambda step: False  #: see `Retention.obsolete`
    saved: int = 0  #: step of the newest checkpoint, on disk as far as this rank knows
    _scores: dict[int, float | None] = field(default_factory=dict)
    _buffers: dict[str, Tensor] = field(default_factory=dict)
    _pool: ThreadPoolExecutor = field(default_factory=partial(ThreadPoolExecutor, 1, "save"))
    _writing: Future[SaveReport] | None = None
    _reports: list[SaveReport] = field(default_factory=list)

    def resume(self, step: int, scores: Scores) -> None:
        """Take up a run whose checkpoint of `step` is on disk, with what its evaluations gave."""
        self.saved = step
        self._scores = {judged: score for judged, score in scores.items() if judged <= step}

    def save(
        self,
        step: int,
        gather: Callable[[ToHost], EngineState | None],
        header: Mapping[str, str] = {},
    ) -> None:
        """Take a snapshot and hand it to the thread. Collective: `gather` gives the state on the main
        process.

        Raises OSError if the save before this one failed.
        """
        began = time.perf_counter()
        self._join()
        state = gather(self.to_host)
        if state is None:
            self.saved = step
            return
        if any(buffer.is_pinned() for buffer in self._buffers.values()):
            torch.cuda.synchronize()  # copies may be on their way
        gathered = time.perf_counter()
        scores = dict(self._scores)

        def write() -> SaveReport:
            save_checkpoint(self.folder, step, state, self.identity, header)
            self.saved = step
            written = time.perf_counter()
            self.delete_obsolete(scores)
            return SaveReport(step, gathered - began, written - gathered)

        self._writing = self._pool.submit(write)

    def to_host(self, name: str, tensor: Tensor) -> Tensor:
        """Begin to copy a tensor to the host as fp32, into the same memory at every save, pinned if it is on
        a GPU.
        """
        if name not in self._buffers:
            self._buffers[name] = torch.empty(tensor.shape, dtype=torch.float32, pin_memory=tensor.is_cuda)
        return self._buffers[name].copy_(tensor.detach(), non_blocking=True)

    def finished(self, *, wait: bool = False) -> list[SaveReport]:
        """Saves that are on disk and were not returned before; with `wait`, all. Raises OSError if one
        failed.
        """
        if wait or (self._writing is not None and self._writing.done()):
            self._join()
        reports, self._reports = self._reports, []
        return reports

    def judged(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Take the outcome of an evaluation into account. Returns whether `step` is the best so far."""
        if self.retention.best is None:
            return False
        score = _number(metrics.get(self.retention.best))
        self._scores[step] = score
        if score is None and metrics:
            names = ", ".join(metrics)
            text = f"the evaluation of step {step} gave no {self.retention.best!r}; it gave {names}"
            print(f"warning: visft.run.keep_best: {text}", file=sys.stderr, flush=True)
        return step == best_step(self._scores)

    def best(self) -> int | None:
        """The best of the steps that have a checkpoint; None without one, or without a metric to choose
        by.
        """
        return best_step({step: self._scores.get(step) for step in saved_steps(self.folder)})

    def since_best(self) -> tuple[int, int | None]:
        """(evaluations that gave the metric after the best one, its step). None before the first."""
        best = best_step(self._scores)
        later = [score for step, score in self._scores.items() if step > (best or 0)]
        return sum(score is not None for score in later), best

    def delete_obsolete(self, scores: Scores | None = None) -> None:
        """Delete what need not stay by these scores, or by all that are known. Main process, nothing being
        written.
        """
        scores = self._scores if scores is None else scores
        steps = saved_steps(self.folder)
        for step in self.retention.obsolete(steps, self.saved, scores, self.to_be_judged):
            delete_checkpoint(checkpoint_path(self.folder, step))

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            self._join()
        except OSError as failed:
            if error is None:
                raise
            # The run ends for another reason; that this save is missing as well must not go unsaid.
            print(f"warning: {failed}", file=sys.stderr, flush=True)
        finally:
            self._pool.shutdown()

    def _join(self) -> None:
        if self._writing is not None:
            writing = self._writing
            self._writing = None  # a failure is raised once
            self._reports.append(writing.result())
