"""Report of a run before its first step, and of `--dry-run` instead of running."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from torch import nn

from visft_ds.config import ResolvedConfig, own
from visft_ds.config.preflight import head_files
from visft_ds.config.schema import VisftConfig
from visft_ds.data.features import FeatureCache
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
from visft_ds.run.machine import Machine, choose_recompute, memory_of
from visft_ds.tasks import TASKS
from visft_ds.tasks.vocabulary import Vocabulary


def print_start(
    config: ResolvedConfig,
    data: RunData,
    machine: Machine,
    prepared: PreparedModel,
    features: FeatureCache | None,
    *,
    start: int,
) -> None:
    """The plan of a run that is about to train, after `start` steps. Main process only."""
    module, run = prepared.module, machine.planned
    for line in own.told(config, sum(len(one.manifest) for one in data.sets.values())):
        print(line, flush=True)
    total = sum(int(getattr(p, "ds_numel", p.numel())) for p in module.parameters())  # ZeRO-3 empties its tensors
    trained = sum(group.count for group in prepared.groups)
    model = config.visft.model
    facts = [
        ("backbone", f"{model.name}: {module.backbone.describe()}"),
        ("parameters", f"{total:,}, of which {trained:,} train ({100 * trained / total:.3f} %)"),
        ("precision", f"{run.precision} ({machine.why_precision})"),
        ("kernels", model.kernels),
        ("compiled", model.compile),
        ("padding", "none, images are packed" if model.packed else "up to the largest image"),
        ("recompute", f"{model.recompute}, {machine.why_recompute}"),
    ]
    sections = [
        Section("model", facts),
        _groups_section(prepared.groups),
        *_batch_sections(config, run),
        _data_section(config.visft, data, features),
        Section("checks passed", [("-", note) for note in prepared.notes]),
        _run_section(config, start),
    ]
    print_plan(_title(config), sections)


def _data_section(config: VisftConfig, data: RunData, features: FeatureCache | None) -> Section:
    """Table of the data: sets, order, readers."""
    sets, plan, rows = data.sets, data.plan, []
    for name, one in sets.items():
        manifest = one.manifest
        shares = f", weight {one.weight:g}: {', '.join(one.tasks)}" if len(sets) > 1 else ""
        where = f"{manifest.root}/{manifest.split}: {len(manifest)} images ({manifest.fingerprint[:12]})"
        rows.append((name if len(sets) > 1 else "shards", f"{where}{shares}"))
    for task, classes in classes_of_run(config, data.categories).items():
        rows.append((f"classes, {task}", f"{len(classes)}, the categories of the data by their ids"))
    for task, part in plan.tasks.items():
        epochs = [f"{plan.steps_per_epoch(task, name)} steps{f' of {name}' * (len(sets) > 1)}" for name in part.sets]
        rows.append((f"epoch, {task}", ", ".join(epochs)))
    number = workers_of(config.data)
    rows.append(("workers", f"{number} for each training process" if number else "none: each training process reads"))
    if config.features is not None and features is not None:
        kept = f"kept in {features.folder}" if features.folder else "not kept (visft.features.cache)"
        rows.append(("features", f"views of each image: {plan.views}, {kept}"))
    return Section("data", rows)


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
    vocabulary = None
    if is_here(config.visft):
        config, data = open_data(config, processes)
        vocabulary = data.vocabulary
    precision, _ = choose_precision(config.visft.model.precision, device)
    run = run_of(config, processes, precision, vocabulary.size if vocabulary else None, device)
    why = "as configured"
    if config.visft.model.recompute == "auto":
        config, why = choose_recompute(config, run, Path(config.visft.run.out or ""), must_fit=False)
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
    assumed = "" if vocabulary else f", with a vocabulary of {PUBLISHED_VOCABULARY:,} ids (ASSUMED)"
    sections = [
        _groups_section(groups, assumed if any(TASKS[task].uses_vocabulary for task in module.heads) else ""),
        *_batch_sections(config, run),
        Section("memory of a process at its fullest, predicted", memory),
        _run_section(config, 0),
    ]
    print_plan(_title(config) + " (dry run: nothing is started)", sections)
    print("\n".join(reasons), end="\n" if reasons else "")
    return 2 if reasons else 0


def _unusable(config: VisftConfig, module: MultiTaskModel, vocabulary: Vocabulary | None) -> Iterator[str]:
    """Reasons why files that are there could not be read at a start; only their names and shapes are looked at."""
    checks: list[Callable[[], object]] = []
    if config.model.weights is not None and (base := local(config.model.weights)).is_file():
        checks.append(partial(open_backbone, module.backbone, base))
    for task, head in module.heads.items():
        known = vocabulary is not None or not TASKS[task].uses_vocabulary  # else nobody knows its number of words
        if known and config.heads.path is not None and head_files(Path(config.heads.path), task):
            checks.append(partial(_open_head, config.heads.path, head, task))
    for check in checks:
        try:
            check()
        except (ValueError, OSError) as error:
            yield f"this run cannot start: {error}"


def _open_head(place: str, head: nn.Module, task: str) -> None:
    open_head(find_head(place, task), task).check(head)


def _title(config: ResolvedConfig) -> str:
    return f"visft_ds stage {config.visft.stage} ({stage_name(config.visft)}), {config.visft.model.name}"


def _groups_section(groups: Sequence[TrainedGroup], note: str = "") -> Section:
    rows = [
        (g.name, str(len(g.names)), f"{g.count:,}", f"{g.lr:g}", f"{g.weight_decay:g}", g.names[0][-42:])
        for g in groups
    ]
    return Section(f"what trains{note}", rows, ("group", "tensors", "values", "lr", "weight decay", "first"))


def _batch_sections(config: ResolvedConfig, run: PlannedRun) -> list[Section]:
    streams, batches = config.visft.streams().values(), run.batches
    total = sum(stream.share for stream in streams)
    zero = config.deepspeed["zero_optimization"]["stage"]
    engine = f"ZeRO-{zero} on {batches.dp} processes"
    if batches.stages > 1:
        engine = f"pipeline of {batches.stages} stages, {batches.dp} times, ZeRO-{zero} between them"
    rows = [("engine", engine), *(("batch", line) for line in batches.equations())]
    for stream in streams:
        rows.append(
            (stream.name, f"{100 * stream.share / total:.0f} % of the steps, learnt by {', '.join(stream.tasks)}")
        )
    pipeline = [Section("pipeline", run.partition.rows(batches.accumulation))] if run.partition else []
    return [Section("batches", rows), *pipeline]


def _run_section(config: ResolvedConfig, start: int) -> Section:
    schedule, run, steps = config.scheduler, config.visft.run, config.total_steps
    best = f" and the best by {run.keep_best}" if run.keep_best else ""
    rows = [
        *(("adapted", line) for line in config.adapted),
        ("steps", f"{steps}, from step {start}" if start else f"{steps}"),
        ("schedule", f"{schedule.type}, {schedule.params.warmup_num_steps} steps of warm-up"),
        ("clipping", f"{config.gradient_clipping:g} (global L2 norm)"),
        ("saved", f"every {run.save_every} steps in {run.out}/checkpoints, kept: the last {run.keep_last}{best}"),
        ("evaluated", f"every {run.eval_every} steps" if run.eval_every else "not during training"),
    ]
    return Section("run", rows)
