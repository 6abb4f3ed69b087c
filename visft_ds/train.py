"""Training, read from top to bottom: `train` builds everything in order, `_loop` is the only training loop."""

from __future__ import annotations

import math
import os
import resource
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from visft_ds.config import (
    Batches,
    ResolvedConfig,
    deepspeed_dict,
    derive_batches,
)
from visft_ds.config.schema import VisftConfig
from visft_ds.data.dataset import DataSet
from visft_ds.data.loader import StepLoader
from visft_ds.data.manifest import Category, Manifest
from visft_ds.data.plan import StepPlan
from visft_ds.data.samples import Batch
from visft_ds.data.shards import ShardReader
from visft_ds.data.store import StoreFailed
from visft_ds.data.vocabulary import Vocabulary
from visft_ds.interop.files import sha256_file
from visft_ds.interop.heads import find_head
from visft_ds.monitor.console import Progress, StepLine
from visft_ds.monitor.metrics import MetricsWriter, RunRecord
from visft_ds.multitask import Normaliser
from visft_ds.parallel import distributed
from visft_ds.parallel.checkpoint import check_identity, newest_checkpoint, open_checkpoint, save_checkpoint
from visft_ds.parallel.engine import Schedule, StepReport, ZeroEngine, start_process_group
from visft_ds.parallel.engine_state import gather_state, restore_state
from visft_ds.parallel.export import export_weights, save_base
from visft_ds.parallel.faults import StopFlag
from visft_ds.run_folder import BACKBONE_FILE, open_run_folder, recorded_config
from visft_ds.stages import PreparedModel, choose_precision, prepare_model
from visft_ds.start_report import data_section, print_start
from visft_ds.streams import pipelines_of, plan_of, vocabulary_of
from visft_ds.training_data import (
    TrainingSet,
    cache_of,
    captioned,
    check_labels,
    check_samples,
    data_identity,
    open_training_data,
    shuffle_of,
    workers_of,
)
from visft_ds.validation import Validation


@dataclass(frozen=True)
class Run:
    """Everything the loop works with."""

    config: ResolvedConfig
    out: Path
    batches: Batches
    engine: ZeroEngine
    loader: StepLoader
    validation: Validation | None  #: None: no evaluation during training
    identity: dict[str, str]  #: what a checkpoint of this run must have been made with
    categories: Sequence[Category]  #: that the heads know
    vocabulary: Vocabulary | None  #: None: no task works with words
    base_sha256: str
    launched: bool  #: by a launcher, whose end must not go unnoticed

    @property
    def total_steps(self) -> int:
        """Length of the run in optimiser steps."""
        return self.config.total_steps


def train(config: ResolvedConfig, *, resume: str, command: Sequence[str]) -> None:
    """Build in order: data, run folder, process group, model, engine, loader; then run the loop and export.

    Raises:
        ValueError: what a user can mend; before any model is allocated wherever that can be known.
        FloatingPointError: a loss that is not finite.
        RuntimeError: ranks that differ.
    """
    out = Path(config.visft.run.out or "")
    config, why_shuffled = settle_shuffle(config, out)
    settings = config.visft
    sets = open_training_data(settings)
    manifest = next(iter(sets.values())).manifest
    validation = _open_validation(settings, manifest)
    vocabulary = vocabulary_of(settings, *captioned(sets))
    batches = derive_batches(config, distributed.world_size())
    loader = _build_loader(settings, sets, vocabulary, batches)
    open_run_folder(out, config, resume)
    device = distributed.local_device()
    precision, why = choose_precision(settings.model.precision, device)

    launched = "RANK" in os.environ
    start_process_group()
    data = {
        "data set": data_identity(sets),
        "order of samples": loader.plan.describe(),
        "vocabulary": vocabulary.fingerprint if vocabulary else "none",
    }
    distributed.assert_same_on_all_ranks({"configuration": config.fingerprint(), **data})
    heads = Path(settings.heads.path) if settings.heads.path else None
    prepared = prepare_model(
        settings,
        config.optimizer.params,
        precision=precision,
        heads_from=heads,
        categories=manifest.categories,
        vocabulary=vocabulary,
    )
    base_sha256 = _keep_random_base(prepared, config, out)
    run = Run(
        config=config,
        out=out,
        batches=batches,
        engine=_build_engine(config, prepared, deepspeed_dict(config, batches.dp, precision)),
        loader=loader,
        validation=Validation(settings, validation, vocabulary, out) if validation else None,
        identity={
            "configuration": config.fingerprint(),
            "precision": precision,
            "base weights": prepared.base_weights,
            "heads": _heads_identity(heads, settings.tasks.enabled()),
            **data,
        },
        categories=manifest.categories,
        vocabulary=vocabulary,
        base_sha256=base_sha256,
        launched=launched,
    )
    start = _resume(run, resume)
    if distributed.is_main():
        RunRecord(config.to_dict(), batches.dp, list(command)).write(out)
        section = data_section(settings, sets, loader.plan, why_shuffled)
        print_start(config, prepared, batches, section, precision=f"{precision} ({why})", device=device, start=start)
    main = distributed.is_main()
    with (
        Progress(run.total_steps, start=start, log_every=settings.run.log_every, enabled=main) as progress,
        MetricsWriter(out, resume_step=start, enabled=main) as writer,
    ):
        try:
            step = _loop(run, start, writer, progress)
        except (ValueError, OSError, StoreFailed) as error:
            error.of_one_rank = True  # type: ignore[union-attr]  # a damaged sample is seen by the rank that reads it
            raise
        finally:
            run.loader.close()  # what is read ahead must not hold up the end
        if step >= run.total_steps:
            _export(run, step)
        distributed.close()
        if run.validation:  # after closing: the other ranks need not wait for the last numbers
            run.validation.poll(writer, progress, wait=True)


def settle_shuffle(config: ResolvedConfig, out: Path) -> tuple[ResolvedConfig, str]:
    """The configuration with its order decided, and why: "auto" means the same as when the run began, wherever its
    shards are now."""
    data = config.visft.data
    recorded = recorded_config(out).visft.data.shuffle if (out / "run.json").is_file() else "auto"
    kind, why = shuffle_of(data)
    if data.shuffle == "auto" and recorded != "auto":
        kind, why = recorded, "as the run began"
    visft = config.visft.model_copy(update={"data": data.model_copy(update={"shuffle": kind})})
    return replace(config, visft=visft), why


def _open_validation(config: VisftConfig, training: Manifest) -> Manifest | None:
    """The split for evaluation during training, where there is any; it fits the tasks and the training data."""
    data = config.data
    if not config.run.eval_every:
        return None
    validation = Manifest.load(data.root, data.val, cache=cache_of(data))
    check_samples(config.tasks.enabled(), validation)
    check_labels(validation, config)
    names = {category.coco_id: category.name for category in training.categories}
    other = [c for c in validation.categories if names.get(c.coco_id) != c.name]
    if other:
        raise ValueError(
            f"{data.root}: category {other[0].coco_id} {other[0].name!r} of {data.val} is "
            f"{names.get(other[0].coco_id, 'absent')!r} in {data.train} ({len(other)} such): make both splits from the "
            "same categories"
        )
    return validation


def _heads_identity(heads: Path | None, tasks: Iterable[str]) -> str:
    """What a checkpoint remembers of the heads that its run was given."""
    return " ".join(sha256_file(find_head(heads, task)) for task in tasks) if heads else "trained here"


def _build_loader(
    settings: VisftConfig, sets: Mapping[str, TrainingSet], vocabulary: Vocabulary | None, batches: Batches
) -> StepLoader:
    kind, number, _ = workers_of(settings.data)
    return StepLoader(
        {name: DataSet(ShardReader(one.manifest), one.categories) for name, one in sets.items()},
        plan_of(settings, sets),
        pipelines_of(settings, sets, vocabulary),
        dp_rank=distributed.rank(),
        dp_size=batches.dp,
        accumulation=batches.accumulation,
        workers=kind,
        num_workers=number,
        prefetch_steps=settings.data.prefetch_steps,
        skip_damaged=settings.data.skip_damaged,
    )


def _build_engine(config: ResolvedConfig, prepared: PreparedModel, deepspeed_config: dict[str, Any]) -> ZeroEngine:
    optimizer, scheduler = config.optimizer.params, config.scheduler
    return ZeroEngine(
        prepared.module,
        prepared.optimizer_groups(),
        deepspeed_config,
        build_optimizer=lambda groups: torch.optim.AdamW(
            groups, lr=optimizer.lr, betas=optimizer.betas, eps=optimizer.eps, weight_decay=optimizer.weight_decay
        ),
        schedule=Schedule(
            scheduler.type,
            scheduler.params.warmup_num_steps,
            config.total_steps,
            scheduler.params.warmup_min_ratio,
            scheduler.params.cos_min_ratio,
        ),
        seed=config.visft.seed,
    )


def _resume(run: Run, resume: str) -> int:
    """Go on from the newest whole checkpoint. Returns the number of steps done, 0 for a fresh start."""
    found, problem = None, None
    if distributed.is_main() and resume != "no":
        checkpoint, skipped = newest_checkpoint(run.out / "checkpoints")
        for line in skipped:
            print(f"warning: not used: {line}", file=sys.stderr, flush=True)
        found = str(checkpoint.path) if checkpoint else None
        if checkpoint is None and (skipped or resume == "must"):
            problem = f"--resume {resume}: no whole checkpoint in {run.out / 'checkpoints'}"
            problem += "; move the damaged ones away to start anew" if skipped else "; use --resume auto to start"
    found, problem = distributed.broadcast_object((found, problem))
    if problem:
        raise ValueError(problem)
    if found is None:
        return 0
    checkpoint = open_checkpoint(Path(found))
    check_identity(checkpoint, run.identity)
    restore_state(run.engine, checkpoint.load(), checkpoint.step)
    return checkpoint.step


def _loop(run: Run, start: int, writer: MetricsWriter, progress: Progress) -> int:
    """The training loop. Returns the number of steps done: all of them, or fewer after a request to stop."""
    settings, validation, predict = run.config.visft.run, run.validation, run.engine.predict
    stop, saved, step, skipped = StopFlag(launched=run.launched), start, start, 0
    if validation and not start:
        validation.draw(predict, start, writer)
    elif validation and validation.resume(start) and validation.is_due(start, run.total_steps):
        validation.evaluate(predict, start, writer, progress)  # the run ended between saving this step and judging it
    began = time.perf_counter()
    for whole, batches in run.loader.steps(start, run.total_steps):
        agreement = distributed.agree_on_step(
            f"step {whole.step} {whole.task}", _counts(run, batches), bool(stop), run.engine.device
        )
        report = run.engine.train_step(whole.step, batches, _normaliser(run, agreement.counts))
        step = whole.step + 1
        _check_finite(run, whole, report, saved)
        _report_skipped(run, progress, skipped)
        skipped = len(run.loader.skipped)
        now = time.perf_counter()
        _record(run, writer, progress, whole, report, seconds=now - began)
        began = now
        if step == run.total_steps or agreement.stop or step % settings.save_every == 0:
            _save(run, step)
            saved = step
            progress.message(f"saved step {step} in {run.out / 'checkpoints'}")
        if validation:
            validation.poll(writer, progress)
            stops = agreement.stop and step < run.total_steps  # then resuming makes up for the evaluation
            if validation.is_due(step, run.total_steps) and not stops:
                validation.evaluate(predict, step, writer, progress)
        if agreement.stop:
            progress.message(
                f"stopped after step {step} ({stop.reason or 'asked by another rank'}); the same command goes on"
            )
            break
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


def _counts(run: Run, batches: Sequence[Batch]) -> dict[str, float]:
    """This rank's counts of a step, from its labels."""
    sums: dict[str, float] = {}
    for batch in batches:
        for name, value in run.engine.module.count(batch).items():
            sums[name] = sums.get(name, 0.0) + value
    return sums


def _normaliser(run: Run, counts: Mapping[str, float]) -> Normaliser:
    """Divisors of the losses such that their mean over ranks and micro-batches is the loss of the global batch."""
    parts = run.batches.dp * run.batches.accumulation
    result: dict[str, dict[str, torch.Tensor]] = {}
    for name, total in counts.items():
        task, _, count = name.partition("/")
        result.setdefault(task, {})[count] = torch.tensor(max(total, 1.0) / parts, device=run.engine.device)
    return result


def _record(
    run: Run, writer: MetricsWriter, progress: Progress, whole: StepPlan, report: StepReport, *, seconds: float
) -> None:
    step, images = whole.step + 1, len(whole.indices)
    progress.update(
        StepLine(
            step=step,
            losses={task: value for task, value in report.losses.items() if task in run.engine.module.heads},
            learning_rate=next(iter(report.learning_rates.values())),
            gradient_norm=report.gradient_norm,
            images=images,
            seconds=seconds,
            wait_seconds=run.loader.wait_seconds,
            peak_memory=_peak_memory(run.engine.device),
        )
    )
    values = {f"loss/{name}": value for name, value in report.losses.items()}
    values |= {f"lr/{name}": value for name, value in report.learning_rates.items()}
    values |= {
        "gradient_norm": report.gradient_norm,
        "images_per_second": images / seconds,
        "data_wait_seconds": run.loader.wait_seconds,
        "data_skipped": float(len(run.loader.skipped)),
        **{f"data_seconds/{name}": one.wall for name, one in run.loader.spent().items()},
        "skipped": float(report.skipped),
    }
    writer.step(step, values)


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kilobytes on Linux


def _check_finite(run: Run, whole: StepPlan, report: StepReport, saved: int) -> None:
    """Stop every rank on the same step when the loss or, in fp32, the gradient is not a number."""
    if math.isfinite(report.losses["loss"]) and (report.skipped or math.isfinite(report.gradient_norm)):
        return
    names = ", ".join(name for name, value in report.losses.items() if not math.isfinite(value)) or "the gradient norm"
    raise FloatingPointError(
        f"step {whole.step + 1} ({whole.task}): {names} is not finite. Nothing was saved since step {saved}. "
        "A smaller learning rate or a longer warm-up usually helps. The images of this step:\n"
        f"  python tools/make_shards.py which --step {whole.step} --run {run.out}"
    )


def _save(run: Run, step: int) -> None:
    state = gather_state(run.engine)
    if state is not None:
        save_checkpoint(run.out / "checkpoints", step, state, run.identity, run.config.visft.run.keep_last)
    distributed.barrier()


def _keep_random_base(prepared: PreparedModel, config: ResolvedConfig, out: Path) -> str:
    """Write random base weights once (an adapter is of no use without its base). Returns the base's sha256."""
    if config.visft.model.weights is not None:
        return prepared.base_weights
    path = out / "export" / BACKBONE_FILE
    if distributed.is_main():  # always anew: a file of an earlier try may hold other weights
        save_base(prepared.module.backbone, path.parent)
    distributed.barrier()
    return sha256_file(path) if distributed.is_main() else ""


def _export(run: Run, step: int) -> None:
    paths = export_weights(
        run.engine,
        run.config,
        run.out / "export",
        step=step,
        categories=run.categories,
        base_weights=run.identity["base weights"],
        base_sha256=run.base_sha256,
        vocabulary=run.vocabulary,
    )
    for path in paths:
        print(f"wrote {path}", flush=True)
