"""Evaluation during training: results from all ranks, numbers from a process beside, pictures for TensorBoard."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from visft_ds.config.schema import VisftConfig
from visft_ds.config.task_schema import Stream
from visft_ds.data.samples import Batch
from visft_ds.data.shards import Manifest, ShardReader
from visft_ds.evals.examples import draw_examples
from visft_ds.evals.runner import Predict, as_metrics, collect, measure
from visft_ds.monitor.metrics import METRICS_FILE, read_metrics
from visft_ds.parallel import distributed
from visft_ds.prepare.data import RunData
from visft_ds.prepare.datasets import workers_of
from visft_ds.redaction import redacted
from visft_ds.resilience.stop import StopFlag
from visft_ds.run.judge import Judge, Verdict
from visft_ds.run.log import RunLog
from visft_ds.tasks import shown_metrics
from visft_ds.tasks.vocabulary import Vocabulary

#: Training photographs that a run is asked about at its end.
PHOTOGRAPHS = 100
#: Seconds that a run which was asked to stop waits for its last numbers: launchers kill after 30.
_PATIENCE = 15.0


def evaluation_is_due(step: int, *, every: int, total_steps: int) -> bool:
    """Return True if a step of a run is followed by an evaluation; `every` 0: none is."""
    return every > 0 and (step == total_steps or step % every == 0)


def validation_of(
    config: VisftConfig, data: RunData, judged: Callable[[int, Mapping[str, float]], bool]
) -> Validation | None:
    """The evaluations of a run; None where it has none."""
    if data.validation is None:
        return None
    return Validation(config, data.streams, data.validation, data.vocabulary, Path(config.run.out or ""), judged)


class Validation:
    """The evaluations of one run, on its validation split.

    Args:
        streams: those of the run, with the classes of its heads.
        judged: takes the numbers of each evaluation; returns whether this step is the best so far.
    """

    def __init__(
        self,
        config: VisftConfig,
        streams: Mapping[str, Stream],
        manifest: Manifest,
        vocabulary: Vocabulary | None,
        out: Path,
        judged: Callable[[int, Mapping[str, float]], bool] = lambda step, metrics: False,
    ) -> None:
        self._streams = streams
        self._config, self._vocabulary, self._out, self._judged = config, vocabulary, out, judged
        self._reader = ShardReader(manifest)
        judged_images = min(config.run.eval_limit or len(manifest), len(manifest))
        #: Which images an evaluation measures, where these are not all.
        self._part = "" if judged_images == len(manifest) else f" on {judged_images} of {len(manifest)} images"
        self._judge = Judge(manifest, config.run.eval_limit)

    def is_due(self, step: int, total_steps: int) -> bool:
        """Return True if `step` (of `total_steps`) is followed by an evaluation."""
        return evaluation_is_due(step, every=self._config.run.eval_every, total_steps=total_steps)

    def is_missing(self, step: int, total_steps: int) -> bool:
        """Return True if an interrupted run owes the evaluation after `step`. The same answer on every rank."""
        recorded, path = False, self._out / METRICS_FILE
        if distributed.is_main() and path.is_file():
            recorded = any(record["step"] == step for record in read_metrics(path, "val/"))
        return self.is_due(step, total_steps) and not distributed.broadcast_object(recorded)

    def evaluate(self, predict: Predict, step: int, log: RunLog, stop: StopFlag) -> bool:
        """Predict the split. Collective; the numbers come later, see `poll`.

        Returns False where a rank was asked to stop meanwhile: an evaluation takes longer than launchers wait. A run
        that goes on from this very step makes up for it.
        """
        config = self._config
        try:
            collected = collect(
                _unless_asked(predict, stop),
                self._reader,
                self._streams,
                self._vocabulary,
                limit=config.run.eval_limit,
                num_workers=workers_of(config.data),
            )
        except _AskedError:
            return False
        if collected is not None:
            for task, results in collected.items():
                said = [
                    f"{one['image_id']}: {one['caption']}" for one in results[: config.run.pictures] if "caption" in one
                ]
                if said:
                    log.writer.text(step, f"{task}/captions", "\n\n".join(said))
            self._judge.start(step, collected)
            self.poll(log)
        self.draw(predict, step, log)
        return True

    def draw(self, predict: Predict, step: int, log: RunLog) -> None:
        """Pictures of the fixed images, after `step`. Collective."""
        config = self._config
        pictures = draw_examples(
            predict,
            self._reader,
            self._streams,
            self._vocabulary,
            config.run.pictures,
            limit=config.run.eval_limit,
        )
        for task, by_image in pictures.items():
            for image_id, picture in by_image.items():
                log.writer.image(step, f"{task}/{image_id:012d}", picture)

    def learnt(self, predict: Predict, training: Manifest, log: RunLog) -> dict[str, float]:
        """AP50 of the first training photographs, by name. Collective; empty but on the main process."""
        reader = ShardReader(training)
        given = (predict, reader, self._streams, self._vocabulary)
        collected = collect(*given, limit=PHOTOGRAPHS)
        outcome, _ = measure(collected or {}, reader, limit=PHOTOGRAPHS)
        return {name: value for name, value in as_metrics(outcome).items() if name.endswith("/AP50")}

    def poll(self, log: RunLog, *, seconds: float | None = 0.0) -> None:
        """Record the numbers of evaluations that are measured within some seconds; None: of all of them."""
        for verdict in self._judge.verdicts(seconds=seconds) if distributed.is_main() else ():
            _record(verdict, log, self._part, best=self._judged(verdict.step, verdict.metrics))

    def leave(self, log: RunLog) -> None:
        """Wait for the numbers, but not for long."""
        self.poll(log, seconds=_PATIENCE)
        if lost := self._judge.close():
            log.message(
                f"{lost} evaluation{'s' * (lost > 1)} could not be measured in {_PATIENCE:.0f} s and are left out"
            )

    def close(self) -> None:
        """End what is being measured."""
        self._judge.close()


def told_of_learning(learnt: Mapping[str, float], last: Mapping[str, float]) -> list[str]:
    """Lines about average precision of training photographs beside that of an evaluation (names begin with `val/`)."""
    lines = []
    for name, value in learnt.items():
        other = last.get(f"val/{name}", math.nan)
        told = f"{name} is {value:.2f} on training images and {other:.2f} on validation"
        if value < 0.5:
            told += ": not learnt yet, more steps help (--steps)"
        elif other < value / 2:
            told += ": learnt by heart; more images help, and more views of them (visft.features.views, image.zoom)"
        lines.append(told)
    return lines


class _AskedError(Exception):
    """Some rank was asked to stop."""


def _unless_asked(predict: Predict, stop: StopFlag) -> Predict:
    """`predict`, which all ranks call equally often, until one of them is asked to stop."""

    def predict_or_stop(batch: Batch) -> Mapping[str, Any]:
        if distributed.any_rank(bool(stop), distributed.local_device()):
            raise _AskedError
        return predict(batch)

    return predict_or_stop


def _record(verdict: Verdict, log: RunLog, part: str, *, best: bool) -> None:
    for problem in verdict.problems:
        text = f"warning: the evaluation of step {verdict.step} failed: {redacted(problem)}"
        print(text, file=sys.stderr, flush=True)
    if verdict.metrics:
        shown = [f"{name} {verdict.metrics[name]:.3f}" for name in shown_metrics() if name in verdict.metrics]
        log.message(f"step {verdict.step} validation{part}: {'  '.join(shown)}{'  (best so far)' if best else ''}")
        log.writer.evaluation(verdict.step, verdict.metrics)
