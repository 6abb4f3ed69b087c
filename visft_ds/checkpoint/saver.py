"""Asynchronous saving: a snapshot in host memory, a thread that writes it, and which checkpoints are kept.

Training stands still only while the state is copied to the host. One save is on its way at a time: the next one waits
for it. What goes wrong in the thread is raised in the training thread, at the next step or at the end.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from visft_ds.checkpoint.format import delete_checkpoints, save_checkpoint, saved_steps
from visft_ds.monitor.metrics import read_metrics
from visft_ds.parallel.state import EngineState, ToHost


@dataclass(frozen=True)
class Retention:
    """Retention policy of checkpoints."""

    last: int  #: the newest so many
    best: str | None = None  #: and the best one by this metric of the validation split (more is better)

    def obsolete(
        self, steps: Sequence[int], newest: int, scores: Mapping[int, float | None], to_be_judged: Callable[[int], bool]
    ) -> list[int]:
        """Steps to delete among those that have a checkpoint.

        Args:
            newest: the one just written. Newer ones (damaged, passed over by a resume) push nothing out and stay.
            scores: step -> the metric; None where the evaluation gave none.
            to_be_judged: whether a step is one that gets evaluated. Numbers come later than the next save.
        """
        older = sorted(step for step in steps if step <= newest)
        kept: set[int | None] = set(older[-self.last :])
        if self.best is not None:
            judged = max(scores, default=-1)
            kept |= {step for step in older if step > judged and to_be_judged(step)}
            kept.add(best_step({step: scores.get(step) for step in older}))
        return [step for step in older if step not in kept]


def best_step(scores: Mapping[int, float | None]) -> int | None:
    """The step of the highest score, the earliest of equal ones; None where there is no number."""
    numbers = {step: score for step, score in scores.items() if score is not None and math.isfinite(score)}
    return max(numbers, key=lambda step: (numbers[step], -step), default=None)


def recorded_scores(path: Path, metric: str) -> dict[int, float | None]:
    """Step -> validation metric, out of the metrics.jsonl of a run; a record without that metric gives None."""
    records = read_metrics(path, "val/") if path.is_file() else ()
    judged = [record for record in records if any(name.startswith("val/") for name in record)]
    return {record["step"]: _number(record.get(f"val/{metric}")) for record in judged}


@dataclass(frozen=True)
class SaveReport:
    """Report of a finished save."""

    step: int
    stall_seconds: float  #: for which training stood still: waiting for the save before, gathering, copying to the host
    write_seconds: float  #: writing, beside the training


class HostBuffers:
    """Host copies of tensors, in the same memory at every save: pinned where they come from a GPU."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        """Copy a tensor to the host as fp32; complete only after `finish`."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != tensor.shape:
            buffer = torch.empty(tensor.shape, dtype=torch.float32, pin_memory=tensor.is_cuda)
            self._buffers[name] = buffer
        buffer.copy_(tensor.detach(), non_blocking=True)
        return buffer

    def finish(self) -> None:
        """Wait for copies that are still on their way."""
        if any(buffer.is_pinned() for buffer in self._buffers.values()):
            torch.cuda.synchronize()


class Saver:
    """Saves of one run; a context manager that lets none get lost at the end.

    Args:
        folder: <run>/checkpoints.
        identity: see `save_checkpoint`.
        retention: which checkpoints stay.
        to_be_judged: see `Retention.obsolete`.
        header: step -> what `save_checkpoint` writes beside the values.
    """

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, str],
        retention: Retention,
        to_be_judged: Callable[[int], bool] = lambda step: False,
        header: Callable[[int], Mapping[str, str]] = lambda step: {},
    ) -> None:
        self.folder, self.identity, self.retention = folder, dict(identity), retention
        self.saved = 0  #: step of the newest checkpoint that this rank knows to be on disk
        self._asked = 0
        self._to_be_judged, self._header = to_be_judged, header
        self._scores: dict[int, float | None] = {}
        self._buffers = HostBuffers()
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="save")
        self._writing: Future[SaveReport] | None = None
        self._reports: list[SaveReport] = []

    def resume(self, step: int, scores: Mapping[int, float | None]) -> None:
        """Take up a run whose checkpoint of `step` is on disk, with what its evaluations gave."""
        self.saved, self._asked = step, step
        self._scores = {judged: score for judged, score in scores.items() if judged <= step}

    def save(self, step: int, gather: Callable[[ToHost], EngineState | None]) -> None:
        """Take a snapshot and hand it to the thread. Collective: `gather` gives the state on the main process.

        Raises OSError if the save before this one failed.
        """
        began = time.perf_counter()
        self._join()
        state = gather(self._buffers)
        if state is None:  # the main process has taken part, so its save before is finished
            self.saved, self._asked = self._asked, step
            return
        self._buffers.finish()
        stall = time.perf_counter() - began
        self._writing = self._pool.submit(self._write, step, state, stall, dict(self._scores))

    def finished(self, *, wait: bool = False) -> list[SaveReport]:
        """Saves that are on disk by now and were not returned before; with `wait`, all of them.

        Raises OSError if a save failed; earlier checkpoints are still there.
        """
        if wait or (self._writing is not None and self._writing.done()):
            self._join()
        reports, self._reports = self._reports, []
        return reports

    def judged(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Take the outcome of an evaluation into account. Returns whether `step` is the best so far."""
        if self.retention.best is None:
            return False
        self._scores[step] = score = _number(metrics.get(self.retention.best))
        if score is None and metrics:
            told = f"the evaluation of step {step} gave no {self.retention.best!r}; it gave {', '.join(metrics)}"
            print(f"warning: visft.run.keep_best: {told}", file=sys.stderr, flush=True)
        return step == best_step(self._scores)

    def best(self) -> int | None:
        """The best of the steps that have a checkpoint; None without one, or without a metric to choose by."""
        saved = set(saved_steps(self.folder))
        return best_step({step: score for step, score in self._scores.items() if step in saved})

    def since_best(self) -> tuple[int, int | None]:
        """(evaluations that gave the metric after the best one, its step). None before the first."""
        best = best_step(self._scores)
        return sum(step > (best or 0) and score is not None for step, score in self._scores.items()), best

    def delete_obsolete(self) -> None:
        """Delete what need not stay now that all evaluations are known. Main process, nothing being written."""
        if self.saved:
            self._delete(self.saved, self._scores)

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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
            writing, self._writing = self._writing, None  # a failure is raised once
            self._reports.append(writing.result())

    def _write(self, step: int, state: EngineState, stall: float, scores: Mapping[int, float | None]) -> SaveReport:
        began = time.perf_counter()
        save_checkpoint(self.folder, step, state, self.identity, self._header(step))
        self.saved = step
        seconds = time.perf_counter() - began
        self._delete(step, scores)
        return SaveReport(step, stall, seconds)

    def _delete(self, newest: int, scores: Mapping[int, float | None]) -> None:
        obsolete = self.retention.obsolete(saved_steps(self.folder), newest, scores, self._to_be_judged)
        delete_checkpoints(self.folder, obsolete)


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
