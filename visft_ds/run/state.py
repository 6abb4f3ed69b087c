"""State of a run from step to step beside the loop: its checkpoints, its resume."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from visft_ds import distributed
from visft_ds.checkpoint.export import begin_export, describe_heads, export_weights
from visft_ds.checkpoint.format import (
    SETTINGS,
    check_identity,
    checkpoint_path,
    explained,
    newest_checkpoint,
    open_checkpoint,
)
from visft_ds.checkpoint.saver import Retention, Saver, recorded_scores
from visft_ds.config import ResolvedConfig
from visft_ds.files import remove_unfinished, write_text
from visft_ds.interop.heads import HeadInfo, head_metadata
from visft_ds.parallel.engine import Engine
from visft_ds.parallel.state import gather_state, restore_state, trainable
from visft_ds.prepare.data import RunData
from visft_ds.prepare.materialize import Start
from visft_ds.prepare.model import PreparedModel
from visft_ds.run.folder import EarlierStarts
from visft_ds.run.log import RunLog
from visft_ds.run.record import write_record
from visft_ds.run_files import CHECKPOINTS, EXPORT, EXPORT_RECORD_FILE, METRICS_FILE, RECORD_FILE


@dataclass
class RunState:
    """The state of one run."""

    config: ResolvedConfig
    engine: Engine  #: whose state is saved and restored
    identity: Mapping[str, str]  #: what a checkpoint must have been made with, beside the settings
    data: RunData  #: categories and words that heads are saved with
    earlier: EarlierStarts
    done: int = 0  #: steps of earlier starts

    def __post_init__(self) -> None:
        run = self.config.visft.run
        self._out = Path(run.out or "")
        #: Its context waits for a save that is on its way.
        self.saver = Saver(
            self._out / CHECKPOINTS,
            {**self.identity, SETTINGS: self.config.identity()},
            Retention(run.keep_last, run.keep_best),
            self.is_evaluated,
        )

    def is_evaluated(self, step: int) -> bool:
        """Return True if this step of a run with a validation split is followed by an evaluation."""
        every = self.config.visft.run.eval_every
        return every > 0 and (step == self.config.total_steps or step % every == 0)

    def resume(self) -> int:
        """Continue from the newest whole checkpoint, if any. Collective. Returns the steps done.

        Raises ValueError if all checkpoints are damaged, there is only an export, or one is of another run.
        """
        path, scores = distributed.by_main_process(self._newest)
        if path is None:
            return 0
        checkpoint = open_checkpoint(path)
        check_identity(checkpoint, self.identity, self.config)
        restore_state(self.engine, checkpoint.load(), checkpoint.step)
        self.saver.resume(checkpoint.step, scores)
        self.done = checkpoint.step
        return checkpoint.step

    def _newest(self) -> tuple[Path | None, dict[int, float | None]]:
        """The checkpoint to continue from, and the scores of its evaluations by the metric that chooses the
        best.
        """
        checkpoint, skipped = newest_checkpoint(self.saver.folder)
        for line in skipped:
            print(f"warning: not used: {line}", file=sys.stderr, flush=True)
        if checkpoint is not None:
            best = self.saver.retention.best
            scores = recorded_scores(self._out / METRICS_FILE, best) if best else {}
            return checkpoint.path, scores
        if skipped:
            raise ValueError(
                f"all checkpoints in {self.saver.folder} are damaged: move or delete them to start over"
            )
        if self.earlier.record is not None:
            raise ValueError(
                f"{self._out} has an export and no checkpoint to continue from: choose another --out"
            )
        return None, {}

    def begin(self, prepared: PreparedModel, command: Sequence[str], start: Start | None) -> None:
        """Write what the export has from the beginning, and the record. Main process only.

        A run that was exported before is not touched: if it ends at once, its export has to be whole.

        Args:
            command: command line that starts this run again.
            start: what the run begins with; None: random values, or it is resumed.
        """
        if not self.earlier.exported:
            begin_export(self._out / EXPORT, prepared, self.data.vocabulary)
        if not self.earlier.exported or self.done < self.config.total_steps:
            write_record(self.config, self.identity, command, start, self.earlier.record)

    def save(self, step: int) -> None:
        """Take a snapshot, written while training continues. Collective. Raises OSError if the one before
        failed.
        """
        self.saver.save(step, partial(gather_state, self.engine), head_metadata(self._heads(step)))

    def report_saves(self, log: RunLog, *, wait: bool = False) -> None:
        """Record the saves that are on disk by now; with `wait`, all of them. Raises OSError if one
        failed.
        """
        for save in self.saver.finished(wait=wait):
            took = f"training paused for {save.stall_seconds:.2f} s; written in {save.write_seconds:.2f} s"
            log.message(f"saved step {save.step} in {self.saver.folder} ({took})")
            seconds = {"save/stall_seconds": save.stall_seconds, "save/write_seconds": save.write_seconds}
            log.writer.save(save.step, seconds)

    def ends_early(self, step: int, log: RunLog) -> bool:
        """Return True if `visft.run.patience` evaluations in a row gave no better metric. Collective.

        The metrics of all evaluations have to be known, so that a resumed run ends at the same step.
        """
        run = self.config.visft.run
        count, best = distributed.by_main_process(self.saver.since_best)
        if best is None or count < run.patience:
            return False
        since = f"without a better {run.keep_best} than that of step {best}"
        log.message(f"early stopping after step {step}: {count} evaluations {since} (visft.run.patience)")
        return True

    def take_best(self, step: int, log: RunLog) -> int:
        """Load the best checkpoint by `visft.run.keep_best` into the engine, to be exported. Collective.

        Returns the step whose values the engine has now: `step` itself if no metric was named or measured.
        """
        best = distributed.by_main_process(self.saver.best)
        if best is None:
            return step
        if best != step:
            checkpoint = open_checkpoint(checkpoint_path(self.saver.folder, best))
            restore_state(self.engine, checkpoint.load(), best)
        log.message(f"exporting step {best}, the best by {self.saver.retention.best}")
        return best

    def _heads(self, step: int) -> dict[str, HeadInfo]:
        """Descriptions of the heads that train in this run."""
        visft = self.config.visft
        facts = {"step": step, "base_weights": self.identity["base weights"], "mode": visft.mode}
        heads = {name.split(".")[1] for name in trainable(self.engine) if name.startswith("heads.")}
        tasks = {name: task for name, task in visft.tasks.enabled().items() if name in heads}
        return describe_heads(self.engine.module.backbone, tasks, facts, self.data)

    def export(self, step: int, prepared: PreparedModel) -> None:
        """Export the checkpoint of `step`, then the record. Main process only. Raises OSError for a full
        disk.
        """
        folder = self._out / EXPORT
        way_out = "Its checkpoint is whole: the same command exports it"
        with explained(f"the export of step {step}", folder, way_out):
            (folder / EXPORT_RECORD_FILE).unlink(missing_ok=True)
            remove_unfinished(folder)
            trained = open_checkpoint(checkpoint_path(self.saver.folder, step)).weights()
            export_weights(trained, folder, prepared, self.config.visft, self._heads(step), step)
            write_text(folder / EXPORT_RECORD_FILE, (self._out / RECORD_FILE).read_text())
            print(f"wrote {folder}", flush=True)
