"""Report of a run before its first step, and of `--dry-run` instead of running."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from visft_ds.config import ResolvedConfig, own
from visft_ds.config.preflight import head_files
from visft_ds.config.schema import VisftConfig
from visft_ds.interop.heads import find_head, open_head
from visft_ds.interop.layouts import open_backbone
from visft_ds.model import MultiTaskModel
from visft_ds.monitor.console import Section, print_plan
from visft_ds.parallel import distributed
from visft_ds.parallel.deepspeed_fixes import check_zero
from visft_ds.planner.memory import PlannedRun, plan_largest, run_of
from visft_ds.prepare.data import RunData, is_here, open_data
from visft_ds.prepare.datasets import classes_of_run, workers_of
from visft_ds.prepare.model import (
    PUBLISHED_VOCABULARY,
    PreparedModel,
    TrainedGroup,
    choose_precision,
    plan_model,
    stage_name,
)
from visft_ds.pretrained import local
from visft_ds.run.machine import Machine, memory_of, recompute_that_fits
from visft_ds.tasks import TASKS
from visft_ds.tasks.vocabulary import Vocabulary


def print_start(config: ResolvedConfig, data: RunData, machine: Machine, prepared: PreparedModel, start: int) -> None:
    """Print the plan of a run that is about to train, after `start` steps. Main process only."""
    for line in own.told(config, sum(len(one.manifest) for one in data.sets.values())):
        print(line, flush=True)
    module, model = prepared.module, config.visft.model
    total = sum(int(getattr(p, "ds_numel", p.numel())) for p in module.parameters())  # ZeRO-3 empties its tensors
    trained = sum(group.count for group in prepared.groups)
    facts = [
        ("backbone", f"{model.name}: {module.backbone.describe()}"),
        ("parameters", f"{total:,}, of which {trained:,} train ({100 * trained / total:.3f} %)"),
        ("precision", f"{machine.planned.precision} ({machine.why_precision})"),
        ("recompute", f"{model.recompute}, {machine.why_recompute}"),
    ]
    between = [
        Section("data", list(_data_rows(config.visft, data))),
        Section("checks passed", [("-", note) for note in prepared.notes]),
    ]
    _print(config, machine.planned, prepared.groups, [Section("model", facts)], between, start=start)


def print_dry_run(config: ResolvedConfig, world_size: int, missing: str) -> int:
    """Print what would train, how batches divide, and why the run could not start.

    Args:
        missing: inputs that are not there, see `render_missing`.

    Returns:
        The exit code: 0, or 2 where an input is missing or is not what a start could read. Whether it fits
        into memory is said, and changes nothing.

    Raises:
        ValueError: groups that match nothing, batches that cannot be divided over the processes, or shards whose
            captions give no vocabulary.
    """
    check_zero(config.deepspeed["zero_optimization"])
    # Planning a pipeline takes no processes: without a launcher, that of one pipeline is shown.
    processes, device = max(world_size, config.pipeline_stages), distributed.local_device()
    vocabulary, why = None, "as configured"
    if is_here(config.visft):
        config, data = open_data(config, processes)
        vocabulary = data.vocabulary
    precision, _ = choose_precision(config.visft.model.precision, device)
    run = run_of(config, processes, precision, vocabulary.size if vocabulary else None, device)
    if config.visft.model.recompute == "auto":
        config, why = recompute_that_fits(config, run, Path(config.visft.run.out or ""), must_fit=False)
        run = run.changed(config)
    module, groups = plan_model(config.visft, config.optimizer.params, run.vocabulary_size)
    reasons = [*([missing] if missing else []), *_unusable(config.visft, module, vocabulary)]
    plan, capacity = plan_largest(run), memory_of(run.device)
    verdict = "fits into" if plan.total <= capacity else "DOES NOT FIT into"
    memory = [
        *plan.rows(),
        ("verdict", f"{verdict} {capacity / 2**20:,.0f} MiB ({run.device.type}, {run.precision})"),
        ("recompute", f"{config.visft.model.recompute}, {why}"),
    ]
    assumed = f", with a vocabulary of {PUBLISHED_VOCABULARY:,} ids (ASSUMED)"
    note = "" if vocabulary or not any(TASKS[task].uses_vocabulary for task in module.heads) else assumed
    between = [Section("memory of a process at its fullest, predicted", memory)]
    _print(config, run, groups, [], between, note=note, title=" (dry run: nothing is started)")
    print("\n".join(reasons), end="\n" if reasons else "")
    return 2 if reasons else 0


def _unusable(config: VisftConfig, module: MultiTaskModel, vocabulary: Vocabulary | None) -> Iterator[str]:
    """The first reason why a file that is there could not be read; only names and shapes are looked at."""
    heads, weights = config.heads.path, config.model.weights
    try:
        if weights is not None and local(weights).is_file():
            open_backbone(module.backbone, local(weights))
        for task, head in module.heads.items():
            known = vocabulary is not None or not TASKS[task].uses_vocabulary  # else nobody knows its number of words
            if known and heads is not None and head_files(Path(heads), task):
                open_head(find_head(heads, task), task).check(head)
    except (ValueError, OSError) as error:
        yield f"this run cannot start: {error}"


def _data_rows(config: VisftConfig, data: RunData) -> Iterator[tuple[str, str]]:
    several = len(data.sets) > 1
    for name, one in data.sets.items():
        manifest = one.manifest
        shares = f", weight {one.weight:g}: {', '.join(one.tasks)}" if several else ""
        where = f"{manifest.root}/{manifest.split}: {len(manifest)} images ({manifest.fingerprint[:12]})"
        yield name if several else "shards", f"{where}{shares}"
    for task, classes in classes_of_run(config, data.categories).items():
        yield f"classes, {task}", f"{len(classes)}, the categories of the data by their ids"
    for task, part in data.plan.tasks.items():
        for name in part.sets:
            yield f"epoch, {task}", f"{data.plan.steps_per_epoch(task, name)} steps{f' of {name}' if several else ''}"
    number = workers_of(config.data)
    yield "workers", f"{number} for each training process" if number else "none: each training process reads"
    if config.features is not None:
        cache = config.features.cache
        kept = f"kept in {cache}" if cache else "not kept (visft.features.cache)"
        yield "features", f"views of each image: {data.plan.views}, {kept}"


def _print(
    config: ResolvedConfig,
    run: PlannedRun,
    groups: Sequence[TrainedGroup],
    before: Sequence[Section],
    between: Sequence[Section],
    *,
    start: int = 0,
    note: str = "",
    title: str = "",
) -> None:
    """Print a plan: sections of one's own, what trains, batches, more sections of one's own, the run."""
    trained = [
        (g.name, str(len(g.names)), f"{g.count:,}", f"{g.lr:g}", f"{g.weight_decay:g}", g.names[0][-42:])
        for g in groups
    ]
    streams, batches = config.visft.streams().values(), run.batches
    zero = config.deepspeed["zero_optimization"]["stage"]
    engine = f"ZeRO-{zero} on {batches.dp} processes"
    if batches.stages > 1:
        engine = f"pipeline of {batches.stages} stages, {batches.dp} times, ZeRO-{zero} between them"
    learnt = [("engine", engine), *(("batch", line) for line in batches.equations())]
    for stream in streams:
        share = 100 * stream.share / sum(other.share for other in streams)
        learnt.append((stream.name, f"{share:.0f} % of the steps, learnt by {', '.join(stream.tasks)}"))
    schedule, settings = config.scheduler, config.visft.run
    best = f" and the best by {settings.keep_best}" if settings.keep_best else ""
    kept = f"every {settings.save_every} steps in {settings.out}/checkpoints, kept: the last {settings.keep_last}{best}"
    rows = [
        *(("adapted", line) for line in config.adapted),
        ("steps", f"{config.total_steps}" + (f", from step {start}" if start else "")),
        ("schedule", f"{schedule.type}, {schedule.params.warmup_num_steps} steps of warm-up"),
        ("clipping", f"{config.gradient_clipping:g} (global L2 norm)"),
        ("saved", kept),
        ("evaluated", f"every {settings.eval_every} steps" if settings.eval_every else "not during training"),
    ]
    sections = [
        *before,
        Section(f"what trains{note}", trained, ("group", "tensors", "values", "lr", "weight decay", "first")),
        Section("batches", learnt),
        *([Section("pipeline", run.partition.rows(batches.accumulation))] if run.partition else []),
        *between,
        Section("run", rows),
    ]
    stage = f"stage {config.visft.stage} ({stage_name(config.visft)})"
    print_plan(f"visft_ds {stage}, {config.visft.model.name}{title}", sections)
