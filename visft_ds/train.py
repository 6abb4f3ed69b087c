"""Training, read from top to bottom.

`train` is the entry. `Trainer.__init__` takes the ten steps before the loop in order, `Trainer.loop` is the
only loop: `step` is one optimiser step, `after_step` saves and evaluates, `finish` exports. What a step
computes is in `parallel/engine.py` and `model.py`; which samples it takes, in `data/plan.py`; files of a run
are in `run/`. A change of the order here changes what all ranks do together: keep every call that is marked
"Collective" out of branches that differ between ranks.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from visft_ds import distributed
from visft_ds.config import ResolvedConfig
from visft_ds.monitor.metrics import Callback
from visft_ds.parallel.engine import build_engine, released, start_process_group
from visft_ds.parallel.placement import placement_for
from visft_ds.prepare.data import keep_features, open_data, open_loader
from visft_ds.prepare.datasets import TrainingSets
from visft_ds.prepare.model import prepare_model
from visft_ds.resilience.guard import LossGuard, first_non_finite
from visft_ds.resilience.memory import memory_explained, probe_memory
from visft_ds.resilience.stop import Stop, StopFlag
from visft_ds.resilience.watchdog import Watchdog
from visft_ds.run.folder import locked, open_run_folder
from visft_ds.run.log import open_log
from visft_ds.run.machine import check_machine, planned_run, rank_facts, settle_checkpointing
from visft_ds.run.report import print_start
from visft_ds.run.start import measure_heads, open_start
from visft_ds.run.state import RunState
from visft_ds.run_files import EXPORT


@dataclass(frozen=True)
class FitResult:
    """Outcome of a run, `heads = visft_ds.fit(...)`.

    Example:
        >>> heads.finished, heads.step, str(heads.export)
        (True, 2, 'runs/heads/export')
        >>> model = visft_ds.load(heads.out)
    """

    out: Path  #: the run folder
    step: int  #: optimiser steps done, those of earlier starts included
    #: trained to the end, to early stopping or until a callback ended it, and exported; if not, the same call
    #: continues
    finished: bool
    stopped: Stop  #: why it ended before everything was done; `Stop.NOT` if it was done
    #: newest number of each name of a step (`loss/loss`) or an evaluation (`val/box/AP`); empty but on the
    #: main process
    metrics: Mapping[str, float]

    @property
    def export(self) -> Path:
        """Folder of what a finished run has trained, heads in stage 1, an adapter or backbone in 2."""
        return self.out / EXPORT


def train(
    config: ResolvedConfig,
    sets: TrainingSets,
    *,
    resume: str,
    command: Sequence[str],
    stop: StopFlag,
    callbacks: Sequence[Callback] = (),
) -> FitResult:
    """Train one stage. Everything that files and shapes show is checked before any model is allocated.

    Args:
        sets: the training sets by name.
        resume: "auto" continues from the newest checkpoint, if there is one; "must" needs one; "no" wants a
            new folder.
        command: command line that starts this run again, for its record.
        stop: asks for an end after the step.

    Raises:
        ValueError: a mistake of the user; settings, code or data that differ between ranks.
        OSError: a disk or a server failed.
        FloatingPointError: losses or gradients that are not finite, more often than
            `visft.run.skip_bad_steps` allows.
        LostRank: another rank ended first.
    """
    with ExitStack() as stack:
        trainer = Trainer(config, sets, resume, command, stop, callbacks, stack)
        return trainer.run()


class Progress(Enum):
    """State of a run after a step or an evaluation."""

    GOES_ON = 0
    COMPLETE = 1  #: all steps are done, or early stopping
    STOPPED = 2  #: a rank was asked to stop; the same command continues


class Trainer:
    """A run from its first look at the data to its result. The arguments are those of `train`.

    Args:
        stack: keeps open what is open until the end of the run: its lock, log, checkpoints, watchdog.
    """

    def __init__(
        self,
        config: ResolvedConfig,
        sets: TrainingSets,
        resume: str,
        command: Sequence[str],
        stop: StopFlag,
        callbacks: Sequence[Callback],
        stack: ExitStack,
    ) -> None:
        self.stop = stop
        self.out = Path(config.visft.run.out or "")

        # 1-3: data, machine, run folder. Each process alone; nothing is written into the run folder yet.
        self.data = open_data(config.visft, sets)
        machine = check_machine(config)
        self.batches = machine.batches
        self.loader = open_loader(config.visft, self.data, self.batches)
        earlier = open_run_folder(self.out, config, resume)
        start_from = open_start(config.visft, self.data, earlier)

        # 4: from here on all ranks act together.
        start_process_group()
        self.watchdog = Watchdog(distributed.rank(), config.visft.run.step_timeout)
        distributed.by_main_process(lambda: stack.enter_context(locked(self.out)))
        # Another run may have used the folder before it was locked.
        earlier = distributed.by_main_process(lambda: open_run_folder(self.out, config, resume))
        stack.enter_context(self.watchdog.watching())

        # 5: the same settings, code and data on all ranks; below, also the same weights.
        start_digest = "" if start_from is None else start_from.sha256
        distributed.assert_same_on_all_ranks(
            {**rank_facts(config), **self.data.identity(), "start": start_digest}
        )
        config, machine = settle_checkpointing(config, machine, self.data.vocabulary, earlier)
        self.config = config

        # 6: the model, with weights of files or drawn ones.
        partition = None
        if self.batches.stages > 1:
            partition = planned_run(config, machine, self.data.vocabulary).partition
        bounds = None if partition is None else partition.bounds
        heads = config.visft.heads.path
        self.prepared = prepare_model(
            config,
            precision=machine.precision,
            heads_from=None if heads is None else Path(heads),
            categories=self.data.categories,
            vocabulary=self.data.vocabulary,
            placement=placement_for(machine.deepspeed_config, bounds),
            start=start_from,
        )
        if config.visft.features is not None:
            keep_features(config.visft, self.data.sets, self.loader, self.prepared, machine.precision)
        identity = {"precision": machine.precision, **self.data.identity(), **self.prepared.identity()}
        distributed.assert_same_on_all_ranks(identity)

        # 7: the engine takes the model over.
        self.engine = build_engine(
            self.prepared,
            config,
            machine.deepspeed_config,
            bounds,
        )
        if distributed.kept_open:  # by a script that trains more than once
            stack.enter_context(released(self.engine))

        # 8: continue where an earlier start of this run was left.
        self.state = RunState(config, self.engine, identity, self.data, earlier)
        self.start = self.state.resume()
        self.done = self.start  # optimiser steps
        self.saved = self.start  # step of the newest checkpoint
        if not self.start:
            measure_heads(self.engine, self.prepared, self.loader, self.data.streams, start_from)
        if distributed.is_main():
            self.state.begin(self.prepared, command, start_from)
            print_start(config, self.data, machine, partition, self.prepared, self.start)

        # 9: what will not fit into memory fails now, not after hours.
        if config.visft.run.memory_check and self.start < config.total_steps:
            probe_memory(self.engine, self.data, self.batches, self.watchdog)

        # 10: the steps, what evaluates beside them, and what writes their numbers down.
        self.steps = self.loader.steps(self.start, config.total_steps)
        stack.enter_context(closing(self.steps))  # its workers would outlive a run that stops early
        self.log = stack.enter_context(open_log(config, self.start, callbacks, stop))
        self.validation = None
        if self.data.validation is not None:
            from visft_ds.run.evaluation import Validation  # brings what measures

            predict = self.engine.predict
            judged = self.state.saver.judged
            validation = Validation(config.visft, self.data, predict, self.log, stop, self.watchdog, judged)
            self.validation = stack.enter_context(closing(validation))
        stack.enter_context(self.state.saver)
        self.guard = LossGuard(config.visft.run.skip_bad_steps)

    def run(self) -> FitResult:
        """Train, then export. Collective."""
        try:
            progress = self.loop()
            with self.watchdog.phase("writing the last checkpoint", timed=False):
                self.state.report_saves(self.log, wait=True)
        finally:
            self.loader.close()  # what is read ahead must not hold up the end
        return self.finish(progress)

    def loop(self) -> Progress:
        """The training loop. Collective."""
        self.stop.listen()
        progress = self.before_first_step()
        while progress is Progress.GOES_ON and self.done < self.config.total_steps:
            stopping = self.step()
            progress = self.after_step(stopping=stopping)
        return Progress.COMPLETE if progress is Progress.GOES_ON else progress

    def step(self) -> bool:
        """Do one optimiser step. Returns True if a rank was asked to stop, or a callback ends the run.
        Collective.
        """
        engine = self.engine
        began = time.perf_counter()
        with self.watchdog.phase(f"step {self.done + 1}: reading"):
            step_plan, batches = next(self.steps)
        where = f"step {step_plan.step + 1} ({step_plan.task})"

        # Losses are divided by what the labels of the whole global batch hold. The all-reduce that sums these
        # counts also asks who was told to stop, and finds ranks that are about to do something else, whose
        # gradients would be added up in silence.
        with self.watchdog.phase(f"{where}: agreeing on it"):
            what = f"step {step_plan.step} {step_plan.task}"
            is_asked = bool(self.stop) or self.log.writer.ends_run
            denominators, stopping = engine.agree_on_step(
                what, batches, self.batches.micro_batches, stop=is_asked
            )

        with (
            self.watchdog.phase(f"{where}: forward, backward, update"),
            memory_explained(where, step_plan.task, batches, engine.device),
        ):
            report = engine.train_step(step_plan.step, batches, denominators)
        self.done = step_plan.step + 1

        # A step that is not finite has changed nothing; too many of them in a row end the run.
        problem = self.guard.observe(step_plan, report)
        if problem:
            if self.guard.ends:
                with self.watchdog.phase(f"{where}: looking for the first value that is not finite"):
                    problem += first_non_finite(engine, step_plan.step, batches, denominators, report)
            self.log.writer.event(self.done, "bad step", details=problem)
            if self.guard.ends:
                self.state.report_saves(self.log, wait=True)  # the last good checkpoint may be on its way
                self.guard.stop(problem, self.state.saver.saved)
            self.log.message(problem)

        self.log.step(step_plan, report, time.perf_counter() - began, self.loader.wait_seconds)
        return stopping

    def before_first_step(self) -> Progress:
        """Draw what the new model predicts, or evaluate the step that an earlier start has saved."""
        if self.validation is None:
            return Progress.GOES_ON
        if not self.start:
            with self.watchdog.phase("drawing predictions"):
                self.validation.draw(self.start)
        elif self.state.is_evaluated(self.start):
            # An earlier start may have ended between saving this step and evaluating it.
            return self.evaluate()
        return Progress.GOES_ON

    def after_step(self, *, stopping: bool) -> Progress:
        """Save and evaluate where it is time to. Collective.

        Args:
            stopping: some rank was asked to stop, or a callback ends the run.
        """
        is_last = self.done == self.config.total_steps
        if is_last or stopping or self.done % self.config.visft.run.save_every == 0:
            self.save()
        self.state.report_saves(self.log)
        if self.validation is not None:
            self.validation.poll()  # numbers of earlier evaluations, which a process measures
        if self.validation is not None and self.state.is_evaluated(self.done):
            progress = self.evaluate()
            if progress is Progress.STOPPED and self.saved < self.done:
                self.save()  # a resume evaluates it
            if progress is not Progress.GOES_ON:
                return progress
        if is_last or not stopping:
            return Progress.GOES_ON
        if any(distributed.from_all_ranks(bool(self.stop))):
            return Progress.STOPPED
        self.log.message(f"a callback ends the run after step {self.done}")
        return Progress.COMPLETE

    def save(self) -> None:
        """Take a checkpoint, which is written while training continues. Collective."""
        with self.watchdog.phase(f"step {self.done}: saving"):
            self.state.save(self.done)
        self.saved = self.done

    def evaluate(self) -> Progress:
        """Evaluate after a step, unless an earlier start has. Collective."""
        validation = self.validation
        assert validation is not None
        step = self.done
        is_evaluated = distributed.by_main_process(lambda: step in self.log.writer.evaluated)
        if not is_evaluated:
            with self.watchdog.phase(f"evaluating after step {step}"):
                goes_on = validation.evaluate(step)
            if not goes_on:
                return Progress.STOPPED
        if not self.config.visft.run.patience:
            return Progress.GOES_ON
        # Early stopping has to know all numbers, so that a resumed run ends at the same step.
        if not self.wait_for_numbers():
            return Progress.STOPPED
        ends = self.state.ends_early(step, self.log)
        return Progress.COMPLETE if ends else Progress.GOES_ON

    def wait_for_numbers(self) -> bool:
        """Wait for all evaluations to be measured; False: this rank was asked to stop. Collective."""
        validation = self.validation
        assert validation is not None
        with self.watchdog.phase(f"measuring after step {self.done}", timed=False):
            return distributed.by_main_process(validation.wait_for_all)

    def finish(self, progress: Progress) -> FitResult:
        """Export what is complete, and write the last numbers. Collective."""
        validation = self.validation
        is_complete = progress is Progress.COMPLETE
        if is_complete and validation is not None and self.config.visft.run.keep_best:
            is_complete = self.wait_for_numbers()  # which decide what is exported
        is_concluded = False
        if is_complete and self.done == self.start:
            is_concluded = distributed.by_main_process(self.was_concluded)
        on_training_images = None
        if is_concluded:
            self.log.message(f"nothing is left to do: {self.out}/export has the result")
        elif is_complete:
            on_training_images = self.export()
        else:
            self.log.message(
                f"stopped after step {self.done} ({self.stop.why()}); the same command continues"
            )
        lacks_numbers = validation is not None and on_training_images is None
        stopped = Stop.NOT
        if not is_concluded and (not is_complete or lacks_numbers):
            stopped = max(distributed.from_all_ranks(self.stop.reason))
        distributed.close()
        self.watchdog.leave()

        # After closing: the other ranks need not wait for the last numbers.
        if validation is not None and not is_concluded:
            knows_all = on_training_images is not None and validation.wait_for_all()
            if knows_all:
                cells = [cell for _, cell in self.prepared.module.backbone.shapes]
                validation.conclude(self.done, on_training_images or {}, cells)
            else:
                stopped = stopped or self.stop.reason
                validation.leave()
        if distributed.is_main():
            self.state.saver.delete_obsolete()
        return FitResult(self.out, self.done, is_complete, stopped, self.log.writer.last)

    def was_concluded(self) -> bool:
        """Return True if an earlier start has exported the result and written all numbers. Main process
        only.
        """
        return self.state.earlier.exported and (self.validation is None or self.log.writer.concluded)

    def export(self) -> dict[str, float] | None:
        """Export the best or the last step; returns metrics on training images, which show whether a run
        memorises. Collective. None: not evaluated, or a rank was asked to stop meanwhile.
        """
        with self.watchdog.phase("exporting", timed=False):
            exported = self.state.take_best(self.done, self.log)
            distributed.by_main_process(lambda: self.state.export(exported, self.prepared))
        return None if self.validation is None else self.validation.on_training_images()
