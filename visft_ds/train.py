"""Training, read from top to bottom: `train` takes the steps before the loop in order, `_loop` is the only loop."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from visft_ds.config import ResolvedConfig
from visft_ds.data.loader import StepLoader
from visft_ds.model import counts_of, loss_denominators_of
from visft_ds.monitor.callbacks import Callback
from visft_ds.parallel import distributed
from visft_ds.parallel.build import build_engine
from visft_ds.parallel.engine import Engine, Schedule, released, start_process_group
from visft_ds.prepare.data import RunData, keep_features, open_data, open_loader
from visft_ds.prepare.datasets import first_of
from visft_ds.prepare.model import prepare_model
from visft_ds.resilience.errors import met_by_one_rank
from visft_ds.resilience.guard import LossGuard, first_non_finite
from visft_ds.resilience.memory import largest_shape, memory_explained, probe_memory
from visft_ds.resilience.stop import Stop, StopFlag
from visft_ds.resilience.watchdog import Watchdog
from visft_ds.run.folder import ENDED_FILE
from visft_ds.run.log import RunLog, open_log
from visft_ds.run.machine import (
    Machine,
    check_machine,
    folder_of_run,
    rank_facts,
    settle_recompute,
)
from visft_ds.run.record import write_record
from visft_ds.run.start import open_run
from visft_ds.run.start_report import print_start
from visft_ds.run.state import RunState
from visft_ds.run.validation import Validation, told_of_learning, validation_of


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
    finished: bool  #: trained to the end or early stopping, and exported; else the same call goes on
    stopped: Stop  #: why it ended before everything was done; `Stop.NOT`: it was done
    metrics: Mapping[str, float]  #: newest number of each name of a step or evaluation; empty but on the main process

    @property
    def export(self) -> Path:
        """Folder of what a finished run has trained: heads after stage 1, an adapter or a backbone after stage 2."""
        return self.out / "export"


def train(
    config: ResolvedConfig,
    *,
    resume: str,
    command: Sequence[str],
    stop: StopFlag,
    callbacks: Sequence[Callback] = (),
) -> FitResult:
    """Train one stage. What can be known from files and shapes is checked before any model is allocated.

    Args:
        resume: "auto" goes on from the newest checkpoint, if there is one; "must" needs one; "no" wants a new folder.
        command: that starts this run again, for its record.

    Raises:
        ValueError: what a user can mend.
        OSError, StoreFailed: a disk or a server.
        FloatingPointError: losses or gradients that are not finite, more often than `visft.run.skip_bad_steps` allows.
        RanksDiffer, LostRank: ranks that are not alike; another one that ended first.
    """
    # 1-3: data, machine, run folder. Each process alone; nothing is written into the run folder yet.
    config, data = open_data(config, distributed.world_size())
    machine = check_machine(config, data.vocabulary_size)
    batches, precision, out = machine.planned.batches, machine.planned.precision, Path(config.visft.run.out or "")
    loader = open_loader(config.visft, data, batches)
    start_from = open_run(config, resume, data)

    # 4: from here on all ranks act together.
    start_process_group()
    watchdog = Watchdog(distributed.rank(), config.visft.run.step_timeout, out / ENDED_FILE)
    with ExitStack() as at_the_end, folder_of_run(out, config, resume), watchdog.watching():
        # 5: the same settings, code and data on all ranks; below, also the same weights.
        began = {} if start_from is None else {"start": start_from.sha256}
        distributed.assert_same_on_all_ranks({**rank_facts(config), **data.identity(), **began})
        config, machine = settle_recompute(config, machine)

        # 6: the model, with weights of files or drawn ones.
        prepared = prepare_model(
            config.visft,
            config.optimizer.params,
            precision=precision,
            heads_from=Path(config.visft.heads.path) if config.visft.heads.path else None,
            categories=data.categories,
            vocabulary=data.vocabulary,
            placement=machine.placement,
            start=start_from,
        )
        features = keep_features(config.visft, data.sets, loader, prepared, precision)
        identity = {"configuration": config.fingerprint(), "precision": precision, **data.identity()}
        identity |= prepared.identity()
        distributed.assert_same_on_all_ranks(identity)

        # 7: the engine takes the model over.
        engine = build_engine(
            prepared,
            machine.deepspeed_config,
            config.optimizer.params,
            Schedule.of(config.scheduler, config.total_steps),
            seed=config.visft.seed,
            partition=machine.planned.partition,
            compile=config.visft.model.compile,
        )
        at_the_end.enter_context(released(engine))

        # 8: go on where an earlier start of this run was left.
        state = RunState(config, engine, identity, data)
        start = state.resume(resume)
        validation = validation_of(config.visft, data, state.judged)
        if validation:
            at_the_end.callback(validation.close)
        if distributed.is_main():
            state.begin_export(prepared)
            write_record(config, identity, command, start_from)
            print_start(config, data, machine, prepared, features, start=start)

        # 9: what will not fit into memory fails now, not after hours.
        if config.visft.run.rehearsal and start < config.total_steps:
            probe_memory(config.visft.model, engine, data, batches, watchdog)

        # 10: train, then export.
        run = Run(config, data, machine, loader, engine, state, validation, stop, watchdog)
        kept = features is not None
        opened = open_log(
            config, start, planned=machine.planned, keeps_features=kept, callbacks=callbacks, gone=stop.output_gone
        )
        with opened as log, state:
            with met_by_one_rank():  # a damaged sample is seen by who reads it
                try:
                    step, complete = _loop(run, start, log)
                    watchdog.begin("writing the last checkpoint", timed=False)
                    state.report_saves(log, wait=True)
                finally:
                    loader.close()  # what is read ahead must not hold up the end
            finished, learnt = complete or step >= config.total_steps, dict[str, float]()
            if finished:
                watchdog.begin("exporting", timed=False)
                if validation and config.visft.run.keep_best:
                    validation.poll(log, seconds=None)
                state.export(state.take_best(step, log), prepared)
            if finished and validation:
                learnt = validation.learnt(engine.predict, first_of(data.sets), log)
            stopped = Stop.NOT if complete else Stop(distributed.largest(stop.reason, engine.device))
            distributed.close()
            watchdog.leave("done" if finished else f"stopped: {stopped.name}")
            # After closing: the other ranks need not wait for the last numbers.
            if validation and finished:
                validation.poll(log, seconds=None)
                log.writer.event(step, "training images evaluated", **learnt)
                for line in told_of_learning(learnt, log.writer.last):
                    log.message(line)
            elif validation:
                validation.leave(log)
            state.delete_obsolete()
            return FitResult(out, step, finished, stopped, log.writer.last)


def _loop(run: Run, start: int, log: RunLog) -> tuple[int, bool]:
    """The training loop. Returns the number of steps done, and whether nothing is left to do (`visft.run.stop_after`).

    After a request to stop, steps or the last evaluation are left; the same command makes up for them.
    """
    engine, state, validation, stop, begin = run.engine, run.state, run.validation, run.stop, run.watchdog.begin
    settings, total_steps = run.config.visft.run, run.config.total_steps
    micro_batches = run.machine.planned.batches.micro_batches
    saved, step, stopping = start, start, False
    stop.listen()
    guard = LossGuard(settings.skip_bad_steps)
    begin("evaluating", timed=False)
    if validation and not start:
        validation.draw(engine.predict, start, log)
    missed = validation and start and validation.is_missing(start, total_steps)
    if validation and missed and not validation.evaluate(engine.predict, start, log, stop):
        # The run had ended between saving this step and evaluating it, and is asked to end again.
        log.message(f"stopped in the evaluation after step {start} ({stop.why()}); the same command makes it")
        return start, False
    if validation and start and state.ends_early(start, partial(validation.poll, log, seconds=None), log):
        return start, True
    began = time.perf_counter()
    begin(f"step {start + 1}: reading")
    for step_plan, batches in run.loader.steps(start, total_steps):
        step, task = step_plan.step + 1, step_plan.task
        begin(f"step {step} ({task}): agreeing on it")
        counts = counts_of(engine.module, batches)
        agreement = distributed.agree_on_step(f"step {step - 1} {task}", counts, bool(stop), engine.device)
        begin(f"step {step} ({task}): forward, backward, update")
        loss_denominators = loss_denominators_of(agreement.counts, micro_batches, engine.device)
        with memory_explained(f"step {step} ({task})", task, partial(largest_shape, batches), engine.device):
            report = engine.train_step(step - 1, batches, loss_denominators)

        if message := guard.observe(step_plan, report):
            if guard.ends:
                begin(f"step {step}: looking for the first value that is not finite")
                message += first_non_finite(engine, step - 1, batches, loss_denominators, report)
            log.writer.event(step, guard.event, details=message)
            if guard.ends:
                state.report_saves(log, wait=True)  # the last good checkpoint may be on its way
                guard.stop(message, state.saved)
            log.message(message)

        now = time.perf_counter()
        tasks = list(engine.module.heads)
        log.step(step_plan, report, batches, run.loader, tasks=tasks, seconds=now - began, device=engine.device)
        if step == total_steps or agreement.stop or step % settings.save_every == 0:
            begin(f"step {step}: saving")
            state.save(step)
            saved = step
        state.report_saves(log)

        stopping = agreement.stop
        if validation:
            validation.poll(log)
            # Resuming makes up for an evaluation that is left out, or not finished: the step is saved.
            if validation.is_due(step, total_steps) and not (stopping and step < total_steps):
                begin(f"evaluating after step {step}", timed=False)
                stopping = not validation.evaluate(engine.predict, step, log, stop) or stopping
                if stopping and saved < step:
                    state.save(step)
                if not stopping and state.ends_early(step, partial(validation.poll, log, seconds=None), log):
                    return step, True
        if stopping and step < total_steps:
            log.message(f"stopped after step {step} ({stop.why()}); the same command goes on")
            break
        began = time.perf_counter()
        begin(f"step {step + 1}: reading")
    missing = validation is not None and stopping and step == total_steps
    if missing:
        log.message(f"asked to stop ({stop.why()}): the last evaluation is left out; the same command makes it")
    return step, step == total_steps and not missing


if __name__ == "__main__":
    print("visft_ds.train is no command; type: visft train, or deepspeed --module visft_ds.launch", file=sys.stderr)
    sys.exit(2)
