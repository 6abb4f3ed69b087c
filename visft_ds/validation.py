"""Evaluation during training: results from all ranks, numbers from a process beside, pictures for TensorBoard."""

from __future__ import annotations

import sys
from pathlib import Path

from visft_ds.config.schema import VisftConfig
from visft_ds.data.manifest import Manifest
from visft_ds.data.shards import ShardReader
from visft_ds.data.vocabulary import Vocabulary
from visft_ds.evals.examples import draw_examples
from visft_ds.evals.judge import Judge, Verdict
from visft_ds.evals.runner import Predict, collect
from visft_ds.monitor.console import Progress
from visft_ds.monitor.metrics import METRICS_FILE, MetricsWriter, read_metrics
from visft_ds.parallel import distributed
from visft_ds.training_data import evaluation_threads

#: What the console shows of an evaluation; metrics.jsonl and TensorBoard have everything.
SHOWN = ("box/AP", "box/AP50", "mask/AP", "mask/AP50", "caption/CIDEr-D", "caption/BLEU-4")


class Validation:
    """The evaluations of one run, on its validation split."""

    def __init__(self, config: VisftConfig, manifest: Manifest, vocabulary: Vocabulary | None, out: Path) -> None:
        self._config, self._vocabulary, self._out = config, vocabulary, out
        self._reader = ShardReader(manifest)
        self._judge = Judge(out / "validation", manifest, config.run.eval_limit)

    def is_due(self, step: int, total_steps: int) -> bool:
        """Whether step (of `total_steps`) is followed by an evaluation."""
        return step == total_steps or step % self._config.run.eval_every == 0

    def resume(self, step: int) -> bool:
        """Take up what an interrupted run left. Returns whether the evaluation after `step` is still to be done.

        The same answer on every rank.
        """
        recorded: set[int] = set()
        if distributed.is_main():
            path = self._out / METRICS_FILE
            records = read_metrics(path) if path.is_file() else ()
            recorded = {r["step"] for r in records if any(name.startswith("val/") for name in r)}
            self._judge.again(step, recorded)
        return step not in distributed.broadcast_object(recorded)

    def evaluate(self, predict: Predict, step: int, writer: MetricsWriter, progress: Progress) -> None:
        """Predict the split. Collective; the numbers come later, see `poll`."""
        config = self._config
        collected = collect(
            predict,
            self._reader,
            config.streams(),
            self._vocabulary,
            limit=config.run.eval_limit,
            threads=evaluation_threads(config.data),
        )
        if collected is not None:
            self._judge.start(step, collected)
            self.poll(writer, progress)
        self.draw(predict, step, writer)

    def draw(self, predict: Predict, step: int, writer: MetricsWriter) -> None:
        """Pictures of the fixed images, after `step`. Collective."""
        config = self._config
        pictures = draw_examples(
            predict,
            self._reader,
            config.streams(),
            self._vocabulary,
            config.run.pictures,
            limit=config.run.eval_limit,
        )
        for task, by_image in pictures.items():
            for image_id, picture in by_image.items():
                writer.image(step, f"{task}/{image_id:012d}", picture)

    def poll(self, writer: MetricsWriter, progress: Progress, *, wait: bool = False) -> None:
        """Record the numbers of evaluations that have been measured by now; with `wait`, of all of them."""
        for verdict in self._judge.verdicts(wait=wait) if distributed.is_main() else ():
            _record(verdict, writer, progress)


def _record(verdict: Verdict, writer: MetricsWriter, progress: Progress) -> None:
    for problem in verdict.problems:
        print(f"warning: the evaluation of step {verdict.step} failed: {problem}", file=sys.stderr, flush=True)
    if verdict.metrics:
        writer.step(verdict.step, {f"val/{name}": value for name, value in verdict.metrics.items()})
        shown = [f"{name} {verdict.metrics[name]:.3f}" for name in SHOWN if name in verdict.metrics]
        progress.message(f"step {verdict.step} validation: {'  '.join(shown)}")
