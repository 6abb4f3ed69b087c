"""Training, read from top to bottom: `train` takes the steps before the loop in order, `_loop` is the only
loop.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from visft_ds import distributed
from visft_ds.checkpoint.export import begin_export
from visft_ds.config import ResolvedConfig
from visft_ds.data.loader import StepLoader
from visft_ds.monitor.callbacks import Callback
from visft_ds.monitor.metrics import CONCLUSION
from visft_ds.parallel.engine import Engine, Schedule, build_engine, released, start_process_group
from visft_ds.parallel.placement import placement_for
from visft_ds.prepare.data import RunData, keep_features, open_data, open_loader
from visft_ds.prepare.model import PreparedModel, prepare_model
from visft_ds.resilience.guard import LossGuard, first_non_finite
from visft_ds.resilience.memory import memory_explained, probe_memory
from visft_ds.resilience.stop import Stop, StopFlag
from visft_ds.resilience.watchdog import Watchdog
from visft_ds.run.advice import findings_of, verdicts
from visft_ds.run.folder import locked, open_run_folder
from visft_ds.run.log import RunLog, open_log
from visft_ds.run.machine import Machine, check_machine, rank_facts, settle_recompute
from visft_ds.run.record import write_record
from visft_ds.run.report import print_start
from visft_ds.run.start import measure_heads, open_start
from visft_ds.run.state import RunState
from visft_ds.tasks.channels import Channels
from visft_ds.tasks.criterion import counts_of, loss_denominators_of

if TYPE_CHECKING:
    from visft_ds.run.evaluation import Validation


@dataclass(frozen=True)
class Run:
    """Everything the loop works with."""

    config: ResolvedConfig
    data: RunData
    machine: Machine
    loader: StepLoader
    engine: Engine
    state: RunState  #: checkpoints
    validation: Validation | None  #: None: no evaluation during training
    stop: StopFlag  #: asks for an end after the step
    watchdog: Watchdog


@dataclass(frozen=True)
class FitResult:
    """Outcome of a run."""

    out: Path  #: the run folder
    step: int  #: optimiser steps done, those of earlier starts included
    finished: bool  #: trained to the end or early stopping, and exported; else the same call continues
    stopped: Stop  #: why it ended before everything was done; `Stop.NOT`: it was done
    metrics: Mapping[
        str, float
    ]  #: newest number of each name of a step or evaluation; empty but on the main process

    @property
    def export(self) -> Path:
        """Folder of what a finished run has trained: heads after stage 1, an adapter or a backbone after
        stage 2.
        """
        return self.out / "export"


def train(
    config: ResolvedConfig,
    *,
    resume: str,
    command: Sequence[str],
    stop: StopFlag,
    callbacks: Sequence[Callback] = (),
) -> FitResult:
    """Train one stage. Everything that files and shapes show is checked before any model is allocated.

    Args:
        resume: "auto" continues from the newest checkpoint, if there is one; "must" needs one; "no" wants a
        new folder.
        command: command line that starts this run again, for its record.

    Raises:
        ValueError: a mistake of the user; settings, code or data that differ between ranks.
        OSError: a disk or a server failed.
        FloatingPointError: losses or gradients that are not finite, more often than
        `visft.run.skip_bad_steps` allows.
        LostRank: another rank ended first.
    """
    # 1-3: data, machine, run folder. Each process alone; nothing is written into the run folder yet.
    config, data = open_data(config, distributed.world_size())
    machine = check_machine(config, data.vocabulary)
    out = Path(config.visft.run.out or "")
    loader = open_loader(config.visft, data, machine.planned.batches)
    start_from = None if config.visft.start is None else open_start(config.visft, data)
    open_run_folder(out, config, resume)

    # 4: from here on all ranks act together.
    start_process_group()
    watchdog = Watchdog(distributed.rank(), config.visft.run.step_timeout)
    with ExitStack() as stack:
        distributed.by_main_process(lambda: stack.enter_context(locked(out)))
        distributed.by_main_process(
            lambda: open_run_folder(out, config, resume)
        )  # another run may have used it since
        stack.enter_context(watchdog.watching())

        # 5: the same settings, code and data on all ranks; below, also the same weights.
        facts = {**rank_facts(config), **data.identity(), "start": start_from.sha256 if start_from else ""}
        distributed.assert_same_on_all_ranks(facts)
        if config.visft.model.recompute == "auto":
            config, machine = settle_recompute(config, machine)

        # 6: the model, with weights of files or drawn ones.
        precision, bounds = machine.planned.precision, machine.planned.bounds
        prepared = prepare_model(
            config.visft,
            config.optimizer.params,
            precision=precision,
            heads_from=Path(config.visft.heads.path) if config.visft.heads.path else None,
            categories=data.categories,
            vocabulary=data.vocabulary,
            placement=placement_for(machine.deepspeed_config, bounds),
            start=start_from,
        )
        if config.visft.features is not None:
            keep_features(config.visft, data.sets, loader, prepared, precision)
        identity = {"precision": precision, **data.identity()}
        identity |= prepared.identity()
        distributed.assert_same_on_all_ranks(identity)

        # 7: the engine takes the model over.
        engine = build_engine(
            prepared,
            machine.deepspeed_config,
            config.optimizer.params,
            Schedule(config.scheduler, config.total_steps),
            seed=config.visft.seed,
            bounds=bounds,
            compile=config.visft.model.compile,
        )
        if distributed.kept_open:  # by a script that trains more than once
            stack.enter_context(released(engine))

        # 8: continue where an earlier start of this run was left.
        state = RunState(config, engine, identity, data)
        start = state.resume()
        if not start and any(isinstance(part, Channels) for part in prepared.module.heads.modules()):
            measure_heads(engine, prepared, loader, data.streams, start_from)
        if distributed.is_main():
            if not state.exported:
                begin_export(out / "export", prepared, data.vocabulary)
            if not (state.exported and start == config.total_steps):
                write_record(config, identity, command, start_from)
            print_start(config, data, machine, prepared, start)

        # 9: what will not fit into memory fails now, not after hours.
        if config.visft.run.rehearsal and start < config.total_steps:
            probe_memory(config.visft.model, engine, data, machine.planned.batches, watchdog)

        # 10: train, then export.
        validation = None
        if data.validation is not None:
            from visft_ds.run.evaluation import Validation  # brings what measures

            validation = Validation(
                config.visft, data.streams, data.validation, data.vocabulary, state.saver.judged
            )
            stack.enter_context(closing(validation))
        run = Run(config, data, machine, loader, engine, state, validation, stop, watchdog)
        log = stack.enter_context(open_log(config, start, callbacks, stop))
        stack.enter_context(state.saver)
        return _train_and_export(run, prepared, start, log)


def _train_and_export(run: Run, prepared: PreparedModel, start: int, log: RunLog) -> FitResult:
    """Run the loop; write the last checkpoint, the export and the last numbers."""
    state, validation, watchdog, settings = run.state, run.validation, run.watchdog, run.config.visft.run
    out = Path(settings.out or "")
    try:
        step, complete = _loop(run, start, log)
        watchdog.begin("writing the last checkpoint", timed=False)
        state.report_saves(log, wait=True)
    finally:
        run.loader.close()  # what is read ahead must not hold up the end
    if complete and validation and settings.keep_best:  # which decides what is exported
        watchdog.begin("measuring the last evaluation", timed=False)
        complete = distributed.by_main_process(lambda: validation.wait_for_all(log, run.stop))
    training: dict[str, float] | None = None
    concluded = False
    if complete:
        concluded = step == start and distributed.by_main_process(lambda: _is_concluded(run, log))
    if concluded:
        log.message(f"nothing is left to do: {out}/export has the result")
    elif complete:
        watchdog.begin("exporting", timed=False)
        exported = state.take_best(step, log)
        distributed.by_main_process(lambda: state.export(exported, prepared))
        if validation:
            images = next(iter(run.data.sets.values())).manifest
            training = validation.on_training_images(run.engine.predict, images, run.stop, watchdog)
    else:
        log.message(f"stopped after step {step} ({run.stop.why()}); the same command continues")
    nothing_left = concluded or (complete and (validation is None or training is not None))
    stopped = Stop.NOT if nothing_left else max(distributed.from_all_ranks(run.stop.reason))
    distributed.close()
    watchdog.leave()
    # After closing: the other ranks need not wait for the last numbers.
    if validation and training is not None and validation.wait_for_all(log, run.stop):
        log.writer.event(step, CONCLUSION, **training)
        findings = findings_of(run.config.visft, run.data, prepared.module.backbone.patch_size)
        for line in verdicts(training, log.writer.evaluations(), run.config.visft.tasks.enabled(), findings):
            log.message(line)
    elif validation and not concluded:
        stopped = stopped or run.stop.reason
        validation.leave(log)
    if distributed.is_main():
        state.saver.delete_obsolete()
    return FitResult(out, step, complete, stopped, log.writer.last)


def _is_concluded(run: Run, log: RunLog) -> bool:
    """Return True if an earlier start has exported the result and written all numbers. Main process only."""
    return run.state.exported and (run.validation is None or log.writer.concluded)


def _loop(run: Run, start: int, log: RunLog) -> tuple[int, bool]:
    """The training loop. Returns the steps done, and False where a request to stop left steps or an
    evaluation.
    """
    engine, state, validation, begin = run.engine, run.state, run.validation, run.watchdog.begin
    settings, total_steps = run.config.visft.run, run.config.total_steps
    saved, step = start, start
    run.stop.listen()
    guard = LossGuard(settings.skip_bad_steps)
    begin("evaluating")
    if validation and not start:
        validation.draw(engine.predict, start, log)
    if validation and start and state.is_evaluated(start):
        # An earlier start may have ended between saving this step and evaluating it.
        outcome = _evaluate(run, validation, start, log)
        if outcome is not Outcome.GOES_ON:
            return start, outcome is Outcome.ENDS
    began = time.perf_counter()
    begin(f"step {start + 1}: reading")
    for step_plan, batches in run.loader.steps(start, total_steps):
        step, task = step_plan.step + 1, step_plan.task
        begin(f"step {step} ({task}): agreeing on it")
        counts = counts_of(engine.module.criteria, batches)
        summed, stopping = distributed.agree_on_step(
            f"step {step - 1} {task}", counts, bool(run.stop), engine.device
        )
        begin(f"step {step} ({task}): forward, backward, update")
        loss_denominators = loss_denominators_of(
            summed, run.machine.planned.batches.micro_batches, engine.device
        )
        with memory_explained(f"step {step} ({task})", task, batches, engine.device):
            report = engine.train_step(step - 1, batches, loss_denominators)

        if message := guard.observe(step_plan, report):
            if guard.ends:
                begin(f"step {step}: looking for the first value that is not finite")
                message += first_non_finite(engine, step - 1, batches, loss_denominators, report)
            log.writer.event(step, "bad step", details=message)
            if guard.ends:
                state.report_saves(log, wait=True)  # the last good checkpoint may be on its way
                guard.stop(message, state.saver.saved)
            log.message(message)

        log.step(step_plan, report, time.perf_counter() - began, run.loader.wait_seconds)
        if step == total_steps or stopping or step % settings.save_every == 0:
            begin(f"step {step}: saving")
            state.save(step)
            saved = step
        state.report_saves(log)

        if validation:
            validation.poll(log)
        if validation and state.is_evaluated(step):
            begin(f"evaluating after step {step}")
            outcome = _evaluate(run, validation, step, log)
            if outcome is Outcome.STOPPED and saved < step:
                state.save(step)  # a resume evaluates it
            if outcome is not Outcome.GOES_ON:
                return step, outcome is Outcome.ENDS
        elif stopping and step < total_steps:
            return step, False
        began = time.perf_counter()
        begin(f"step {step + 1}: reading")
    return step, True


class Outcome(Enum):
    """What follows an evaluation."""

    GOES_ON = 0
    ENDS = 1  #: early stopping
    STOPPED = 2  #: a rank was asked to stop; the same command evaluates again


def _evaluate(run: Run, validation: Validation, step: int, log: RunLog) -> Outcome:
    """Evaluate after a step, unless an earlier start has. Collective."""
    evaluated = distributed.by_main_process(lambda: step in log.writer.evaluated)
    if not evaluated and not validation.evaluate(run.engine.predict, step, log, run.stop, run.watchdog):
        return Outcome.STOPPED
    if not run.config.visft.run.patience:
        return Outcome.GOES_ON
    if not distributed.by_main_process(lambda: validation.wait_for_all(log, run.stop)):
        return Outcome.STOPPED
    return Outcome.ENDS if run.state.ends_early(step, log) else Outcome.GOES_ON
