"""Report of a run before its first step, and of `--dry-run` instead of running."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from visft_ds.config import ResolvedConfig
from visft_ds.config.own import BY_RECIPE
from visft_ds.interop.heads import open_head
from visft_ds.interop.layouts import open_backbone
from visft_ds.model import MultiTaskModel
from visft_ds.monitor.console import Section, print_plan
from visft_ds.planner.memory import PlannedRun, plan_largest
from visft_ds.prepare.data import RunData, is_here, open_data
from visft_ds.prepare.datasets import classes_of_run
from visft_ds.prepare.model import PUBLISHED_VOCABULARY, PreparedModel, TrainedGroup, plan_model, stage_name
from visft_ds.pretrained import local
from visft_ds.run.advice import findings_of, lines_of
from visft_ds.run.machine import Machine, check_machine, memory_of, settle_recompute
from visft_ds.tasks import TASKS
from visft_ds.tasks.head_files import head_files

#: Photographs that a DETR memorises.
FEW_FOR_DETR = 100


def print_start(
    config: ResolvedConfig, data: RunData, machine: Machine, prepared: PreparedModel, start: int
) -> None:
    """Print the plan of a run that is about to train, after `start` steps. Main process only."""
    for line in told(config, sum(len(one.manifest) for one in data.sets.values())):
        print(line, flush=True)
    rows = []
    for name, one in data.sets.items():
        where = f"{one.manifest.root}/{one.manifest.split}: {len(one.manifest)} images"
        rows.append((f"shards {name}", f"{where}, weight {one.weight:g}: {', '.join(one.tasks)}"))
    for task, classes in classes_of_run(config.visft, data.categories).items():
        rows.append((f"classes, {task}", f"{len(classes)}, the categories of the data by their ids"))
    for task, part in data.plan.tasks.items():
        rows += [
            (f"epoch, {task}", f"{data.plan.steps_per_epoch(task, name)} step(s) of {name}")
            for name in part.sets
        ]
    if (features := config.visft.features) is not None:
        kept = f"kept in {features.cache}" if features.cache else "not kept (visft.features.cache)"
        rows.append(("features", f"{data.plan.views} view(s) of each image, {kept}"))
    title, plan = _plan(config, machine.planned, prepared.groups, start=start)
    passed = [("-", note) for note in prepared.notes]
    sections = [_model(config, machine, prepared.module, prepared.groups), *plan, Section("data", rows)]
    sections += _shown_by_data(config, data, prepared.module)
    print_plan(title, [*sections, Section("checks passed", passed)])


def _model(
    config: ResolvedConfig, machine: Machine, module: MultiTaskModel, groups: Sequence[TrainedGroup]
) -> Section:
    model = config.visft.model
    total = sum(
        int(getattr(p, "ds_numel", p.numel())) for p in module.parameters()
    )  # ZeRO-3 empties its tensors
    trained = sum(group.count for group in groups)
    facts = [
        ("backbone", f"{model.name}: {module.backbone.describe()}"),
        ("parameters", f"{total:,}, of which {trained:,} train ({100 * trained / total:.3f} %)"),
        ("precision", f"{machine.planned.precision} ({machine.why_precision})"),
        ("recompute", f"{model.recompute}, {machine.why_recompute}"),
    ]
    return Section("model", facts)


def _shown_by_data(config: ResolvedConfig, data: RunData, module: MultiTaskModel) -> list[Section]:
    """A section about what stands in the way of learning, or none."""
    rows = list(lines_of(findings_of(config.visft, data, module.backbone.patch_size)))
    return [Section("what the data shows", rows)] if rows else []


def told(config: ResolvedConfig, images: int) -> list[str]:
    """Lines about a user's own photographs: what was chosen for them and why, and what will not work."""
    visft, run, lines = config.visft, config.visft.run, list[str]()
    detection = visft.tasks.enabled().get("detection")
    head = None if detection is None else detection.head.model_dump()["type"]
    if config.sources.get("visft.run.save_every", "").startswith(BY_RECIPE):
        stream = next(iter(visft.streams().values()))
        end = f"block {visft.model.layers[0]}" if visft.model.layers else "its last block"
        parts = [
            f"{images} photographs: {visft.model.preset}, frozen, up to {end}, at {stream.largest_side()} px"
        ]
        if head == "dense":
            parts.append("dense boxes (too few photographs for a DETR)")
        if visft.features is not None:
            kept = f", features kept in {visft.features.cache}" if visft.features.cache else ""
            parts.append(f"{visft.features.views} views of each (flipped, zoomed){kept}")
        parts.append(
            f"{config.total_steps} steps of {stream.batch_size} images, lr {config.optimizer.params.lr:g}"
        )
        if run.keep_best:
            count = math.ceil(config.total_steps / run.eval_every)
            parts.append(f"{count} evaluations, the best {run.keep_best} is kept")
        lines.append(
            f"{'; '.join(parts)}. Change this by --backbone, --tasks, --steps, --batch-size, --lr, --set"
        )
    if head == "detr" and visft.stage == 1 and images <= FEW_FOR_DETR:
        lines.append(
            f"warning: a DETR memorises {images} photographs and finds nothing on others: give "
            "--set visft.tasks.detection.head.type=dense"
        )
    return lines


def print_dry_run(config: ResolvedConfig, world_size: int) -> None:
    """Print what would train, how batches divide, and whether it fits into memory.

    Raises:
        ValueError: what keeps a start from running on this machine, such as a file that cannot be read. A
        plan
            that does not fit into memory is only reported.
    """
    # Planning a pipeline takes no processes: without a launcher, that of one pipeline is shown.
    processes, vocabulary, data = max(world_size, config.pipeline_stages), None, None
    if is_here(config.visft):
        config, data = open_data(config, processes)
        vocabulary = data.vocabulary
        for line in told(config, sum(len(one.manifest) for one in data.sets.values())):
            print(line, flush=True)
    machine = check_machine(config, vocabulary, processes)
    if config.visft.model.recompute == "auto":
        config, machine = settle_recompute(config, machine, must_fit=False)
    run = machine.planned
    module, groups = plan_model(config.visft, config.optimizer.params, run.vocabulary_size)
    plan, capacity = plan_largest(run), memory_of(run.device)
    verdict = "fits into" if plan.total <= capacity else "DOES NOT FIT into"
    memory = [
        *plan.rows(),
        ("verdict", f"{verdict} {capacity / 2**20:,.0f} MiB ({run.device.type}, {run.precision})"),
    ]
    guessed = vocabulary is None and any(TASKS[task].uses_vocabulary for task in module.heads)
    note = f", with a vocabulary of {PUBLISHED_VOCABULARY:,} ids (ASSUMED)" if guessed else ""
    title, sections = _plan(config, run, groups, note)
    sections.insert(0, _model(config, machine, module, groups))
    if data is not None:
        sections += _shown_by_data(config, data, module)
    sections.append(Section("predicted peak memory of a process", memory))
    print_plan(f"{title} (dry run: nothing is started)", sections)
    # Names and shapes in the files that exist are checked.
    weights, heads = config.visft.model.weights, config.visft.heads.path
    if weights is not None and local(weights).is_file():
        open_backbone(module.backbone, local(weights))
    for task, head in module.heads.items():
        if (
            heads is None
            or not head_files(Path(heads), task)
            or (TASKS[task].uses_vocabulary and vocabulary is None)
        ):
            continue  # without the data nobody knows its number of words
        open_head(heads, task).check(head)


def _plan(
    config: ResolvedConfig, run: PlannedRun, groups: Sequence[TrainedGroup], note: str = "", start: int = 0
) -> tuple[str, list[Section]]:
    """Title and sections of the plan: what trains, in which batches, how a pipeline is divided, what is
    kept.
    """
    title = f"visft_ds stage {config.visft.stage} ({stage_name(config.visft)}), {config.visft.model.name}"
    trained = [
        (g.name, str(len(g.names)), f"{g.count:,}", f"{g.lr:g}", f"{g.weight_decay:g}", g.names[0][-42:])
        for g in groups
    ]
    streams, batches = config.visft.streams().values(), run.batches
    zero = config.deepspeed["zero_optimization"]["stage"]
    engine, parts = f"ZeRO-{zero}, {batches.dp} process(es)", "process(es)"
    if batches.stages > 1:
        engine, parts = (
            f"{batches.dp} pipeline(s) of {batches.stages} stages, ZeRO-{zero} between them",
            "pipeline(s)",
        )
    learnt = [("engine", engine)]
    for name, images in batches.batch_size.items():
        division = (
            f"micro-batch {batches.micro[name]} x accumulation {batches.accumulation} x {batches.dp} {parts}"
        )
        learnt.append(("batch", f"{name}: {images} images = {division}"))
    for stream in streams:
        share = 100 * stream.share / sum(other.share for other in streams)
        learnt.append((stream.name, f"{share:.0f} % of the steps train {', '.join(stream.tasks)}"))
    schedule, settings = config.scheduler, config.visft.run
    best = f" and the best by {settings.keep_best}" if settings.keep_best else ""
    kept = f"every {settings.save_every} steps in {settings.out}/checkpoints, kept: the last {settings.keep_last}{best}"
    rows = [
        *(("adapted", line) for line in config.adapted),
        ("steps", f"{config.total_steps}" + (f", from step {start}" if start else "")),
        ("schedule", f"{schedule.type}, {schedule.params.warmup_num_steps} steps of warm-up"),
        ("saved", kept),
        ("evaluated", f"every {settings.eval_every} steps" if settings.eval_every else "not during training"),
    ]
    return title, [
        Section(f"what trains{note}", trained, ("group", "tensors", "values", "lr", "weight decay", "first")),
        Section("batches", learnt),
        *([Section("pipeline", run.partition.rows(batches.accumulation))] if run.partition else []),
        Section("run", rows),
    ]
