"""State of a run from step to step beside the loop: its checkpoints, its resume."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import TracebackType

from visft_ds.checkpoint.disk import explained
from visft_ds.checkpoint.export import begin_export, describe_heads, export_weights
from visft_ds.checkpoint.format import check_identity, checkpoint_path, newest_checkpoint, open_checkpoint
from visft_ds.checkpoint.saver import Retention, Saver, recorded_scores
from visft_ds.config import ResolvedConfig
from visft_ds.config.preflight import EXPORT_RECORD_FILE, RECORD_FILE
from visft_ds.interop.card import repository_of
from visft_ds.interop.heads import HeadInfo, described
from visft_ds.interop.weights import remove_unfinished, write_text
from visft_ds.monitor.metrics import METRICS_FILE
from visft_ds.parallel import distributed
from visft_ds.parallel.engine import Engine
from visft_ds.parallel.state import gather_state, restore_state, trainable
from visft_ds.prepare.data import RunData
from visft_ds.prepare.model import PreparedModel
from visft_ds.run.evaluation import Validation, evaluation_is_due
from visft_ds.run.folder import saved_something
from visft_ds.run.log import RunLog


class RunState:
    """The state of one run; a context manager that waits for a save that is on its way.

    Args:
        config: `visft.run` says what is kept.
        engine: whose state is saved and restored.
        identity: what a checkpoint of this run must have been made with.
        data: categories and words that heads are saved with.
    """

    def __init__(self, config: ResolvedConfig, engine: Engine, identity: Mapping[str, str], data: RunData) -> None:
        run = config.visft.run
        self.identity = dict(identity)
        self._out, self._engine, self._config, self._data = Path(run.out or ""), engine, config, data
        due = partial(evaluation_is_due, every=run.eval_every, total_steps=config.total_steps)
        retention = Retention(run.keep_last, run.keep_best)
        self._saver = Saver(
            self._out / "checkpoints", self.identity, retention, due, lambda step: described(self._heads(step))
        )

    @property
    def saved(self) -> int:
        """Step of the newest checkpoint that this rank knows to be on disk; 0 before the first."""
        return self._saver.saved

    def resume(self, how: str) -> int:
        """Go on from the newest whole checkpoint. Returns the number of steps done, 0 for a fresh start.

        Args:
            how: "auto", "must" or "no".

        Raises:
            ValueError: damaged checkpoints only, none although one is a must or there is an export, one of another run.
        """
        found, problem = None, None
        folder = self._saver.folder
        if distributed.is_main() and how != "no":
            checkpoint, skipped = newest_checkpoint(folder)
            for line in skipped:
                print(f"warning: not used: {line}", file=sys.stderr, flush=True)
            found = str(checkpoint.path) if checkpoint else None
            if checkpoint is None and not skipped and saved_something(self._out):
                problem = (
                    f"{self._out} has an export and no checkpoint to go on from: choose another --out, or move export "
                    "away to train anew"
                )
            elif checkpoint is None and (skipped or how == "must"):
                problem = f"--resume {how}: no whole checkpoint in {folder}"
                problem += "; move the damaged ones away to start anew" if skipped else "; use --resume auto to start"
        found, problem = distributed.broadcast_object((found, problem))
        if problem:
            raise ValueError(problem)
        if found is None:
            return 0
        checkpoint = open_checkpoint(Path(found))
        check_identity(checkpoint, self.identity)
        state = checkpoint.load()
        restore_state(self._engine, state, checkpoint.step)
        best = self._saver.retention.best
        self._saver.resume(checkpoint.step, recorded_scores(self._out / METRICS_FILE, best) if best else {})
        return checkpoint.step

    def save(self, step: int) -> None:
        """Take a snapshot; it is written while training goes on. Collective.

        Raises:
            OSError: the save before this one failed.
        """
        self._saver.save(step, partial(gather_state, self._engine))

    def report_saves(self, log: RunLog, *, wait: bool = False) -> None:
        """Record the saves that are on disk by now; with `wait`, all of them.

        Raises:
            OSError: one could not be written.
        """
        for save in self._saver.finished(wait=wait):
            seconds = {"save/stall_seconds": save.stall_seconds, "save/write_seconds": save.write_seconds}
            log.message(
                f"saved step {save.step} in {self._saver.folder} (training stood still for {save.stall_seconds:.2f} s; "
                f"written in {save.write_seconds:.2f} s)"
            )
            log.writer.save(save.step, seconds, checkpoint_path(self._saver.folder, save.step))

    def judged(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Take the numbers of an evaluation into account. Returns whether `step` is the best so far."""
        return self._saver.judged(step, metrics)

    def ends_early(self, step: int, validation: Validation, log: RunLog) -> bool:
        """Return True if `visft.run.stop_after` evaluations in a row gave no better metric. Collective.

        It waits for the numbers of all evaluations so far: a run that is resumed ends at the same step.
        """
        run = self._config.visft.run
        if not run.stop_after:
            return False
        validation.poll(log, seconds=None)
        count, best = distributed.broadcast_object(self._saver.since_best())
        if best is None or count < run.stop_after:
            return False
        place = checkpoint_path(self._saver.folder, best)
        log.message(
            f"ends after step {step}: {count} evaluations without a better {run.keep_best} than that of step {best} "
            f"(visft.run.stop_after); its checkpoint {f'is {place}' if place.is_dir() else 'was not kept'}"
        )
        return True

    def delete_obsolete(self) -> None:
        """Delete what need not stay, now that all evaluations are known."""
        if distributed.is_main():
            self._saver.delete_obsolete()

    def take_best(self, step: int, log: RunLog) -> int:
        """Let the engine have the values of the best checkpoint by `visft.run.keep_best`, to be exported. Collective.

        Args:
            step: that the engine has made, and keeps where no metric was named or measured.

        Returns:
            The step whose values the engine has now.
        """
        metric = self._saver.retention.best
        best = distributed.broadcast_object(self._saver.best()) if metric else None
        if best is None:
            return step
        if best != step:
            checkpoint = open_checkpoint(checkpoint_path(self._saver.folder, best))
            state = checkpoint.load()
            restore_state(self._engine, state, best)
        log.message(f"exports step {best}, the best by {metric}")
        return int(best)

    def _heads(self, step: int) -> dict[str, HeadInfo]:
        """Descriptions of the heads that train in this run."""
        visft = self._config.visft
        facts = {"step": step, "base_weights": self.identity["base weights"], "mode": visft.mode}
        heads = {name.split(".")[1] for name in trainable(self._engine) if name.startswith("heads.")}
        tasks, data = {name: task for name, task in visft.tasks.enabled().items() if name in heads}, self._data
        return describe_heads(self._engine.module.backbone, tasks, facts, data.categories, data.vocabulary)

    def begin_export(self, prepared: PreparedModel) -> None:
        """Write what of the export is known before training. Main process only. Raises OSError: a full disk."""
        folder = self._out / "export"
        with explained("what the run does not train", folder, "The same command goes on"):
            begin_export(folder, prepared, self._data.vocabulary)

    def export(self, step: int, prepared: PreparedModel) -> None:
        """Export what has trained, and then the record of the run. Collective.

        Args:
            prepared: what the run started from.

        Raises:
            OSError: a full disk.
        """
        folder, lora = self._out / "export", self._config.visft.lora
        with explained(f"the export of step {step}", folder, "Its checkpoint is whole: the same command exports it"):
            if distributed.is_main():
                remove_unfinished(folder)
            paths = export_weights(
                self._engine,
                folder,
                prepared,
                lora=lora,
                infos=self._heads(step),
                repository=repository_of(self._config.visft.model.weights),
            )
            if distributed.is_main():
                write_text(folder / EXPORT_RECORD_FILE, (self._out / RECORD_FILE).read_text())
            for path in paths:
                print(f"wrote {path}", flush=True)

    def __enter__(self) -> RunState:
        self._saver.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._saver.__exit__(kind, error, trace)
