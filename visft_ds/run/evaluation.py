"""Evaluation during training: all ranks predict, a process beside the training measures, TensorBoard gets
pictures.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import torch

from visft_ds import distributed
from visft_ds.config.schema import VisftConfig
from visft_ds.data.samples import Batch
from visft_ds.data.shards import ShardReader
from visft_ds.data.workers import fork_server, kill_pool, start_worker
from visft_ds.evaluation import collect, draw_examples, example_positions, measure
from visft_ds.monitor.metrics import CONCLUSION
from visft_ds.prepare.data import RunData, workers_of
from visft_ds.redaction import redacted
from visft_ds.resilience.stop import StopFlag
from visft_ds.resilience.watchdog import Watchdog
from visft_ds.run.advice import findings_of, verdicts
from visft_ds.run.log import RunLog
from visft_ds.tasks import Results, shown_metrics
from visft_ds.tasks.task import Predict

#: Training images that a run is evaluated on at its end.
TRAINING_IMAGES = 100
#: Seconds that a run which was asked to stop waits for its last numbers: launchers kill after 30.
_PATIENCE = 15.0
_LOOK = 0.2  #: seconds between looks at a request to stop while numbers are waited for
_KILLED = (
    "the measuring process was killed twice, as Linux does when memory runs out; its numbers are missing"
)

#: Metrics by name, and a line for each task that cannot be measured.
Measured = tuple[dict[str, float], list[str]]


@dataclass
class Validation:
    """The evaluations of one run on its validation split."""

    config: VisftConfig
    data: RunData
    predict: Predict  #: of the model as it is by then
    log: RunLog  #: where the numbers go
    stop: StopFlag  #: this rank was asked to stop
    watchdog: Watchdog  #: times each batch
    #: takes the numbers of each evaluation; returns whether this step is the best so far
    judged: Callable[[int, Mapping[str, float]], bool] = lambda step, metrics: False

    def __post_init__(self) -> None:
        assert self.data.validation is not None
        self._heads = {task: settings.head for task, settings in self.config.tasks.enabled().items()}
        self._reader = ShardReader(self.data.validation)
        self._pool: ProcessPoolExecutor | None = None
        self._waiting: deque[_Queued] = deque()

    def evaluate(self, step: int) -> bool:
        """Predict the split. Collective; the numbers come later, see `poll`.

        Returns False if a rank was asked to stop: launchers do not wait so long, and a resumed run evaluates
        again.
        """
        try:
            collected = collect(
                self._unless_stopped(f"evaluating after step {step}"),
                self._reader,
                self.data.streams,
                self.data.vocabulary,
                limit=self.config.run.eval_limit,
                num_workers=workers_of(self.config.data),
            )
        except _StoppedError:
            return False
        if collected is not None:
            self.measure(step, collected)
            self._draw(step, collected)
        self.poll()
        return True

    def _unless_stopped(self, doing: str) -> Predict:
        """What predicts a batch, and raises `_StoppedError` on all ranks as soon as one is asked to stop."""

        def stoppable(batch: Batch) -> Mapping[str, Any]:
            with self.watchdog.phase(doing):
                # All ranks have equally many batches.
                if any(distributed.from_all_ranks(bool(self.stop))):
                    raise _StoppedError
                return self.predict(batch)

        return stoppable

    def measure(self, step: int, collected: Mapping[str, Results]) -> None:
        """Queue the results of a step, {task: results}, for measuring."""
        self._waiting.append(_Queued(step, collected, self._submit(collected)))

    def _submit(self, collected: Mapping[str, Results]) -> Future[Measured]:
        for _ in range(2):
            if self._pool is None:
                self._pool = ProcessPoolExecutor(1, mp_context=fork_server(), initializer=_start_measuring)
            try:
                return self._pool.submit(
                    measure, collected, self._reader, self._heads, limit=self.config.run.eval_limit
                )
            except BrokenProcessPool:  # it was killed while it had nothing to do
                self._pool = None
        raise RuntimeError("the process that measures evaluations cannot be started: it ends at once")

    def poll(self, *, seconds: float | None = 0.0) -> None:
        """Record the metrics of evaluations that are measured within some seconds; None: wait for all of
        them.

        A process that was killed while it measured is started anew, once for each evaluation.
        """
        until = None if seconds is None else time.monotonic() + seconds
        while self._waiting:
            first = self._waiting[0]
            wait([first.future], None if until is None else max(0.0, until - time.monotonic()))
            if not first.future.done():
                return
            error = first.future.exception()
            was_killed = isinstance(error, BrokenProcessPool)
            if was_killed and not first.again:
                first.again = True
                first.future = self._submit(first.collected)
                continue
            self._waiting.popleft()
            if error is None:
                metrics, problems = first.future.result()
                self._record(first.step, metrics, problems)
            else:
                problem = _KILLED if was_killed else f"{type(error).__name__}: {error}"
                self._record(first.step, {}, [problem])

    def wait_for_all(self) -> bool:
        """Record the metrics of all evaluations; False: some are missing, as this rank was asked to stop."""
        while self._waiting:
            if self.stop:
                return False
            self.poll(seconds=_LOOK)
        return True

    def _record(self, step: int, metrics: Mapping[str, float], problems: list[str]) -> None:
        for problem in problems:
            text = f"warning: the evaluation of step {step} failed: {redacted(problem)}"
            print(text, file=sys.stderr, flush=True)
        is_best = self.judged(step, metrics)
        if not metrics:
            return
        images = len(self._reader)
        limit = self.config.run.eval_limit
        on_part = f" on {limit} of {images} images" if limit and limit < images else ""
        shown = [f"{name} {metrics[name]:.3f}" for name in shown_metrics() if name in metrics]
        if is_best:
            shown.append("(best so far)")
        self.log.message(f"step {step} validation{on_part}: {'  '.join(shown)}")
        self.log.writer.evaluation(step, metrics)

    def draw(self, step: int) -> None:
        """Draw the predictions of the fixed images after `step`, which is not evaluated. Collective."""
        data = self.data
        run = self.config.run
        positions = example_positions(self._reader, list(self._heads), run.visualizations, run.eval_limit)
        if positions:
            collected = collect(
                self.predict, self._reader, data.streams, data.vocabulary, positions=positions
            )
            if collected is not None:
                self._draw(step, collected)

    def _draw(self, step: int, collected: Mapping[str, Results]) -> None:
        run = self.config.run
        examples = draw_examples(collected, self._reader, run.visualizations, limit=run.eval_limit)
        for task, by_image in examples.items():
            for image_id, picture in by_image.items():
                self.log.writer.image(step, f"{task}/{image_id:012d}", picture)

    def on_training_images(self) -> dict[str, float] | None:
        """AP50 and mIoU of the first training images. Collective; empty on all ranks but the main process.

        Returns None if a rank was asked to stop.
        """
        data = self.data
        reader = ShardReader(next(iter(data.sets.values())).manifest)
        predict = self._unless_stopped("evaluating training images")
        try:
            collected = collect(predict, reader, data.streams, data.vocabulary, limit=TRAINING_IMAGES)
        except _StoppedError:
            return None
        metrics, _ = measure(collected or {}, reader, self._heads, limit=TRAINING_IMAGES)
        return {name: value for name, value in metrics.items() if name.endswith(("/AP50", "/mIoU"))}

    def conclude(self, step: int, training: Mapping[str, float], cells: Sequence[int]) -> None:
        """Record the metrics on training images, and say what they mean beside those of validation.

        Args:
            cells: see `findings_of`.
        """
        writer = self.log.writer
        writer.event(step, CONCLUSION, **training)
        findings = findings_of(self.config, self.data, cells)
        for line in verdicts(training, writer.evaluations(), self.config.tasks.enabled(), findings):
            self.log.message(line)

    def leave(self) -> None:
        """Wait some seconds for the numbers of evaluations; report those that are left out."""
        self.poll(seconds=_PATIENCE)
        if self._waiting:
            steps = ", ".join(str(queued.step) for queued in self._waiting)
            self.log.message(
                f"metrics of step {steps} were not ready after {_PATIENCE:.0f} s and are skipped"
            )

    def close(self) -> None:
        """Cancel the evaluations that are being measured."""
        self._waiting.clear()
        if self._pool is not None:
            kill_pool(self._pool)


@dataclass
class _Queued:
    """Evaluation that is being measured."""

    step: int
    collected: Mapping[str, Results]
    future: Future[Measured]
    again: bool = False  #: its first process was killed


class _StoppedError(Exception):
    """Some rank was asked to stop."""


def _start_measuring() -> None:
    start_worker()
    torch.set_num_threads(1)  # the training has the other cores
