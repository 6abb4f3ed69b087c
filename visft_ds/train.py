"""Training, read from top to bottom: `train` builds everything in order, `_loop` is the only training loop."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from visft_ds.checkpoint.disk import explained
from visft_ds.checkpoint.export import export_weights, save_base
from visft_ds.config import Batches, ResolvedConfig, deepspeed_dict, derive_batches
from visft_ds.config.schema import Precision, VisftConfig
from visft_ds.data.dataset import DataSet
from visft_ds.data.features import FeatureCache
from visft_ds.data.loader import StepLoader
from visft_ds.data.manifest import Category
from visft_ds.data.plan import StepPlan
from visft_ds.data.roles import IdleLoader
from visft_ds.data.samples import Batch
from visft_ds.data.shards import ShardReader
from visft_ds.data.store import StoreFailed
from visft_ds.interop.files import sha256_file
from visft_ds.interop.layouts import tower_metadata
from visft_ds.interop.writing import remove_unfinished
from visft_ds.model import LossDenominators, counts_of, loss_denominators_of
from visft_ds.models.compiled import check_compiler, compile_blocks
from visft_ds.monitor.callbacks import Callback
from visft_ds.monitor.console import Progress, StepLine
from visft_ds.monitor.metrics import MetricsWriter
from visft_ds.ops import use_kernels
from visft_ds.parallel import distributed
from visft_ds.parallel.build import build_engine
from visft_ds.parallel.engine import Engine, StepReport, released, start_process_group
from visft_ds.parallel.partition import Place, plan_partition
from visft_ds.parallel.placement import placement_for
from visft_ds.planner import settle_recompute
from visft_ds.prepare.datasets import (
    TrainingSet,
    captioned,
    data_identity,
    first_of,
    open_training_data,
    settle_classes,
    shuffle_of,
    workers_of,
)
from visft_ds.prepare.materialize import Placement
from visft_ds.prepare.model import PreparedModel, choose_precision, heads_identity, prepare_model
from visft_ds.prepare.places import located, paths_of
from visft_ds.prepare.streams import features_of, pipelines_of, plan_of, streams_of, vocabulary_of
from visft_ds.resilience.guard import LossGuard, find_overflow, is_finite, resumed_guard
from visft_ds.resilience.heartbeat import stopped_because
from visft_ds.resilience.host_memory import peak_memory
from visft_ds.resilience.memory import rehearse
from visft_ds.resilience.out_of_memory import MemoryWatch, largest_shape
from visft_ds.resilience.signals import StopFlag
from visft_ds.resilience.watchdog import Watchdog, watch
from visft_ds.run.folder import BACKBONE_FILE, open_run_folder, recorded_config, saved_something, set_aside
from visft_ds.run.machine import check_shared_memory, check_space, locked_for_all_ranks, rank_facts
from visft_ds.run.record import write_record
from visft_ds.run.start_report import data_section, print_start
from visft_ds.run.state import RunState
from visft_ds.run.validation import Validation, open_validation
from visft_ds.tasks.vocabulary import Vocabulary


@dataclass(frozen=True)
class Run:
    """Everything the loop works with."""

    config: ResolvedConfig
    out: Path
    batches: Batches
    engine: Engine
    loader: StepLoader | IdleLoader
    validation: Validation | None  #: None: no evaluation during training
    state: RunState  #: checkpoints and averages
    categories: Sequence[Category]  #: that the heads know
    vocabulary: Vocabulary | None  #: None: no task works with words
    base_sha256: str
    stop: StopFlag  #: asks for an end after the step
    watchdog: Watchdog
    memory: MemoryWatch  #: explains a step that does not fit

    @property
    def total_steps(self) -> int:
        """Length of the run in optimiser steps."""
        return self.config.total_steps


@dataclass(frozen=True)
class FitResult:
    """Outcome of a run."""

    out: Path  #: the run folder
    step: int  #: optimiser steps done, those of earlier starts included
    finished: bool  #: all steps are done and exported; else it was stopped, `step` is saved and the same call goes on
    requeue: bool  #: SIGUSR1 asked for the job to be queued again
    metrics: Mapping[str, float]  #: newest number of each name in metrics.jsonl; empty but on the main process

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
    """Build in order: data, run folder, process group, model, engine, loader; then run the loop and export.

    Raises:
        ValueError: what a user can mend; before any model is allocated wherever that can be known.
        FloatingPointError: a loss that is not finite.
        RuntimeError: ranks that differ.
    """
    out = Path(config.visft.run.out or "")
    given, config = paths_of(config.visft), located(config, out)
    config, why_shuffled = settle_shuffle(config, out)
    sets = open_training_data(config.visft)
    manifest = first_of(sets)
    config = settle_classes(config, manifest)
    config, how = settle_recompute(config, out)
    settings = config.visft
    validation = open_validation(settings, manifest)
    vocabulary = vocabulary_of(settings, *captioned(sets))
    batches = derive_batches(config, distributed.world_size())
    loader = _build_loader(settings, sets, vocabulary, batches)
    device = distributed.local_device()
    precision, why = choose_precision(settings.model.precision, device)
    use_kernels(settings.model.kernels, device)
    check_compiler(settings.model.compile, device)
    for_deepspeed = deepspeed_dict(config, distributed.world_size(), precision)
    partition = plan_partition(config, batches, vocabulary.size if vocabulary else None)
    open_run_folder(out, config, resume)
    check_shared_memory(config, batches)

    start_process_group()
    with (
        ExitStack() as at_the_end,
        locked_for_all_ranks(out),
        watch(out, settings.run.heartbeat_timeout, settings.run.step_timeout, alike=batches.stages == 1) as watchdog,
    ):
        _clear_run_folder(out, config, resume)
        data = {
            "data set": data_identity(sets),
            "order of samples": loader.plan.describe(),
            "vocabulary": vocabulary.fingerprint if vocabulary else "none",
        }
        recomputing = f"{settings.model.recompute}, every {settings.model.checkpoint_every}"
        distributed.assert_same_on_all_ranks({**rank_facts(config), **data, "recomputing": recomputing})
        placement = placement_for(for_deepspeed, partition)
        prepared, features = _prepare(config, sets, vocabulary, loader, precision, placement)
        identity = {"configuration": config.fingerprint(), "precision": precision, **data}
        identity |= {"base weights": prepared.base_weights, "heads": heads_identity(settings)}
        distributed.assert_same_on_all_ranks(identity)
        check_space(out, sum(group.count for group in prepared.groups), settings.run)
        base_sha256 = _keep_random_base(prepared, config, out)
        engine = at_the_end.enter_context(released(build_engine(config, prepared, for_deepspeed, partition)))
        compile_blocks(prepared.module.backbone, settings.model.compile)
        state = RunState(config, engine, identity)
        run = Run(
            config=config,
            out=out,
            batches=batches,
            engine=engine,
            loader=loader,
            validation=None
            if validation is None
            else Validation(settings, streams_of(settings, manifest), validation, vocabulary, out, state.judged),
            state=state,
            categories=manifest.categories,
            vocabulary=vocabulary,
            base_sha256=base_sha256,
            stop=stop,
            watchdog=watchdog,
            memory=MemoryWatch(config, engine.device, precision, vocabulary.size if vocabulary else None),
        )
        start = state.resume(resume)
        if distributed.is_main():
            write_record(config, given, sets, base_sha256, command)
            section = data_section(settings, sets, loader.plan, why_shuffled, features)
            told = {"precision": f"{precision} ({why})", "recompute": how}
            print_start(config, prepared, batches, section, partition, **told, device=device, start=start)
        if settings.run.rehearsal and start < run.total_steps:
            rehearse(config, engine, batches, sets, vocabulary, watchdog=watchdog, memory=run.memory)
        return _loop_and_export(run, start, callbacks)


def _loop_and_export(run: Run, start: int, callbacks: Sequence[Callback]) -> FitResult:
    """Run the loop, then export."""
    settings, state, main = run.config.visft.run, run.state, distributed.is_main()
    with (
        Progress(run.total_steps, start=start, log_every=settings.log_every, enabled=main) as progress,
        MetricsWriter(run.out, resume_step=start, enabled=main, callbacks=callbacks) as writer,
        state,
    ):
        try:
            step = _loop(run, start, writer, progress)
            run.watchdog.begin("writing the last checkpoint", timed=False)
            state.report_saves(writer, progress, wait=True)
        except (ValueError, OSError, StoreFailed) as error:
            error.of_one_rank = True  # type: ignore[union-attr]  # a damaged sample is seen by the rank that reads it
            raise
        finally:
            run.loader.close()  # what is read ahead must not hold up the end
        if step >= run.total_steps:
            run.watchdog.begin("exporting", timed=False)
            _export(run, step)
        requeue = step < run.total_steps and distributed.any_rank(run.stop.requeue, run.engine.device)
        distributed.close()
        run.watchdog.leave("done" if step >= run.total_steps else stopped_because(run.stop.reason))
        if run.validation and step < run.total_steps:
            run.validation.leave(writer, progress)
        elif run.validation:  # after closing: the other ranks need not wait for the last numbers
            run.validation.poll(writer, progress, wait=True)
        state.delete_obsolete()
        return FitResult(run.out, step, step >= run.total_steps, requeue, writer.last)


def _clear_run_folder(out: Path, config: ResolvedConfig, resume: str) -> None:
    """Set a run aside that saved nothing. Collective: the folder is ours by now, whatever another run did meanwhile.

    Raises:
        ValueError: on every rank, as `open_run_folder`.
    """
    problem = None
    if distributed.is_main():
        try:
            if open_run_folder(out, config, resume):
                print(
                    f"the run in {out} saved nothing: it is kept in {set_aside(out)}, this one starts anew", flush=True
                )
        except (ValueError, OSError) as error:
            problem = str(error)
    problem = distributed.broadcast_object(problem)
    if problem:
        raise ValueError(problem)


def settle_shuffle(config: ResolvedConfig, out: Path) -> tuple[ResolvedConfig, str]:
    """The configuration with its order decided, and why: "auto" means the same as when the run began, wherever its
    shards are now."""
    data = config.visft.data
    recorded = recorded_config(out).visft.data.shuffle if saved_something(out) else "auto"
    kind, why = shuffle_of(data)
    if data.shuffle == "auto" and recorded != "auto":
        kind, why = recorded, "as the run began"
    visft = config.visft.model_copy(update={"data": data.model_copy(update={"shuffle": kind})})
    return replace(config, visft=visft), why


def _prepare(
    config: ResolvedConfig,
    sets: Mapping[str, TrainingSet],
    vocabulary: Vocabulary | None,
    loader: StepLoader | IdleLoader,
    precision: Precision,
    placement: Placement,
) -> tuple[PreparedModel, FeatureCache | None]:
    """The model, and where the features of its backbone are kept, if they are."""
    settings = config.visft
    prepared = prepare_model(
        settings,
        config.optimizer.params,
        precision=precision,
        heads_from=Path(settings.heads.path) if settings.heads.path else None,
        categories=first_of(sets).categories,
        vocabulary=vocabulary,
        placement=placement,
    )
    features = features_of(settings, sets, prepared.base_weights, precision, distributed.local_device().type)
    if features is not None:
        if prepared.module.train_backbone:
            raise ValueError(
                "visft.features: a parameter group trains the backbone, which changes all features: set it to null"
            )
        assert isinstance(loader, StepLoader)
        prepared.module.feature_cache = features
        loader.keep_features(features)
    return prepared, features


def _build_loader(
    settings: VisftConfig, sets: Mapping[str, TrainingSet], vocabulary: Vocabulary | None, batches: Batches
) -> StepLoader | IdleLoader:
    kind, number, _ = workers_of(settings.data)
    place = Place.of_rank(distributed.rank(), distributed.world_size(), batches.stages)
    if place.role is None:
        return IdleLoader(plan_of(settings, sets))
    return StepLoader(
        {name: DataSet(ShardReader(one.manifest), one.categories) for name, one in sets.items()},
        plan_of(settings, sets),
        pipelines_of(settings, sets, vocabulary),
        dp_rank=place.dp_rank,
        dp_size=place.dp_size,
        accumulation=batches.accumulation,
        role=place.role,
        workers=kind,
        num_workers=number,
        prefetch_steps=settings.data.prefetch_steps,
        skip_damaged=settings.data.skip_damaged,
    )


def _loop(run: Run, start: int, writer: MetricsWriter, progress: Progress) -> int:
    """The training loop. Returns the number of steps done: all of them, or fewer after a request to stop."""
    settings, validation, predict = run.config.visft.run, run.validation, run.engine.predict
    stop, begin, saved, step, skipped = run.stop, run.watchdog.begin, start, start, 0
    stop.listen()
    guard = resumed_guard(settings, run.out, run.loader.plan, start)
    begin("evaluating", timed=False)
    if validation and not start:
        validation.draw(predict, start, writer)
    missed = validation and start and validation.resume(start) and validation.is_due(start, run.total_steps)
    if validation and missed and not validation.evaluate(predict, start, writer, progress, stop):
        return start  # the run had ended between saving this step and judging it, and is asked to end again
    began = time.perf_counter()
    begin(f"step {start + 1}: reading")
    for step_plan, batches in run.loader.steps(start, run.total_steps):
        begin(f"step {step_plan.step + 1} ({step_plan.task}): agreeing on it")
        counts = counts_of(run.engine.module, batches)
        agreement = distributed.agree_on_step(
            f"step {step_plan.step} {step_plan.task}", counts, bool(stop), run.engine.device
        )
        begin(f"step {step_plan.step + 1} ({step_plan.task}): forward, backward, update")
        loss_denominators = loss_denominators_of(
            agreement.counts, run.batches.dp * run.batches.accumulation, run.engine.device
        )
        with run.memory.watched(
            f"step {step_plan.step + 1} ({step_plan.task})", step_plan.task, partial(largest_shape, batches)
        ):
            report = run.engine.train_step(step_plan.step, batches, loss_denominators)
        step = step_plan.step + 1
        run.state.follow_step()
        if message := guard.observe(step_plan, report):
            message = _examine(run, guard, writer, message, step, batches, loss_denominators, report)
            run.state.report_saves(writer, progress, wait=True)  # the last good checkpoint may be on its way
            guard.check(message, run.state.saved)
            progress.message(message)
        _report_skipped(run, progress, skipped)
        skipped = len(run.loader.skipped)
        now = time.perf_counter()
        _record(run, writer, progress, step_plan, report, seconds=now - began)
        began = now
        if step == run.total_steps or agreement.stop or step % settings.save_every == 0:
            begin(f"step {step}: saving")
            run.state.save(step)
            saved = step
        run.state.report_saves(writer, progress)
        stopping = agreement.stop
        if validation:
            validation.poll(writer, progress)
            # Resuming makes up for an evaluation that is left out, or not finished: the step is saved.
            if validation.is_due(step, run.total_steps) and not (stopping and step < run.total_steps):
                begin(f"evaluating after step {step}", timed=False)
                stopping = not validation.evaluate(predict, step, writer, progress, stop) or stopping
                if stopping and saved < step:
                    run.state.save(step)
        if stopping:
            progress.message(
                f"stopped after step {step} ({stop.reason or 'asked by another rank'}); the same command goes on"
            )
            break
        begin(f"step {step + 1}: reading")
    return step


def _report_skipped(run: Run, progress: Progress, known: int) -> None:
    for one in run.loader.skipped[known:]:
        told = (
            f"step {one.step + 1}: sample {one.index} of {one.dataset} replaced by {one.instead} "
            f"({len(run.loader.skipped)} so far on rank {distributed.rank()}): {one.reason}"
        )
        if distributed.is_main():
            progress.message(told)
        else:  # each rank sees the damage of its own samples
            print(told, file=sys.stderr, flush=True)


def _record(
    run: Run, writer: MetricsWriter, progress: Progress, step_plan: StepPlan, report: StepReport, *, seconds: float
) -> None:
    step, images = step_plan.step + 1, len(step_plan.indices)
    progress.update(
        StepLine(
            step=step,
            losses={task: value for task, value in report.losses.items() if task in run.engine.module.heads},
            learning_rate=next(iter(report.learning_rates.values())),
            gradient_norm=report.gradient_norm,
            images=images,
            seconds=seconds,
            wait_seconds=run.loader.wait_seconds,
            peak_memory=peak_memory(run.engine.device),
        )
    )
    values = {f"loss/{name}": value for name, value in report.losses.items()}
    values |= {f"lr/{name}": value for name, value in report.learning_rates.items()}
    if report.loss_scale is not None:
        values["loss_scale"] = report.loss_scale
    values |= {
        "gradient_norm": report.gradient_norm,
        "images_per_second": images / seconds,
        "data_wait_seconds": run.loader.wait_seconds,
        "data_skipped": float(len(run.loader.skipped)),
        **{f"data_seconds/{name}": one.wall for name, one in run.loader.spent().items()},
        "skipped": float(report.skipped),
        "refused": float(bool(report.refused)),
        "not_finite": float(not is_finite(report)),
    }
    writer.step(step, values)


def _examine(
    run: Run,
    guard: LossGuard,
    writer: MetricsWriter,
    message: str,
    step: int,
    batches: Sequence[Batch],
    loss_denominators: LossDenominators,
    report: StepReport,
) -> str:
    """Record what is to be said of a step; keep the state before one that went wrong. Returns the whole message."""
    kept = ""
    if guard.bad or guard.collapsed:
        run.watchdog.begin(f"step {step}: saving the state before it")
        kept = run.state.save_refused(step, report.loss_scale)
    if guard.collapsed:  # after saving: it leaves the engine in disorder
        message += find_overflow(run.engine, step - 1, batches, loss_denominators, report)
    writer.event(step, guard.event, details=message)
    return message + kept


def _keep_random_base(prepared: PreparedModel, config: ResolvedConfig, out: Path) -> str:
    """Write random base weights once (an adapter is of no use without its base). Returns the base's sha256."""
    if config.visft.model.weights is not None:
        return prepared.base_weights
    path = out / "export" / BACKBONE_FILE
    if distributed.is_main():  # always anew: a file of an earlier try may hold other weights
        with explained("the base weights", path.parent, "The same command goes on"):
            save_base(prepared.base, tower_metadata(prepared.module.backbone), path)
    distributed.barrier()
    return sha256_file(path) if distributed.is_main() else ""


def _export(run: Run, step: int) -> None:
    """Export what trained, and beside it its averages in folders of their own."""
    folder = run.out / "export"
    with explained(f"the export of step {step}", folder, "Its checkpoint is whole: the same command exports it"):
        if distributed.is_main():
            remove_unfinished(folder)
        for name, values in {".": {}, **run.state.averages()}.items():
            paths = export_weights(
                run.engine,
                run.config,
                folder / name,
                step=step,
                categories=run.categories,
                base_weights=run.state.identity["base weights"],
                base_sha256=run.base_sha256,
                vocabulary=run.vocabulary,
                instead=values,
            )
            for path in paths:
                print(f"wrote {path}", flush=True)


if __name__ == "__main__":
    print("visft_ds.train is no command; type: visft train, or deepspeed --module visft_ds.launch", file=sys.stderr)
    sys.exit(2)
