"""Report of a run before its first step, and of `--dry-run` instead of running."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from visft_ds.config import Batches, ResolvedConfig
from visft_ds.interop.heads import open_head
from visft_ds.interop.layouts import open_backbone
from visft_ds.model import MultiTaskModel
from visft_ds.models import Backbone
from visft_ds.models.eva_vit import EvaViT
from visft_ds.monitor.console import Section, print_plan
from visft_ds.ops import DTYPES
from visft_ds.ops.attention import packed_kernel
from visft_ds.prepare.data import RunData, open_data
from visft_ds.prepare.datasets import TrainingSets, classes_of_run
from visft_ds.prepare.inputs import missing_shards
from visft_ds.prepare.model import PUBLISHED_VOCABULARY, PreparedModel, TrainedGroup, plan_model, stage_name
from visft_ds.pretrained import local
from visft_ds.run.advice import findings_of, lines_of
from visft_ds.run.folder import look_into
from visft_ds.run.machine import Machine, check_machine, memory_of, planned_run, settle_checkpointing
from visft_ds.run.start import open_start
from visft_ds.tasks import TASKS
from visft_ds.tasks.head_files import head_files

if TYPE_CHECKING:
    from visft_ds.planner.partition import Partition

_WIDEST_VALUE = 40  #: characters


def print_start(
    config: ResolvedConfig,
    data: RunData,
    machine: Machine,
    partition: Partition | None,
    prepared: PreparedModel,
    start: int,
) -> None:
    """Print the plan of a run that is about to train, after `start` steps. Main process only."""
    sections = [
        *_plan(config, machine, partition, prepared.module, prepared.groups, start),
        _data(config, data),
        *_shown_by_data(config, data, prepared.module),
        Section("checks passed", [("-", note) for note in prepared.notes]),
    ]
    print_plan(_title(config), sections)


def print_dry_run(config: ResolvedConfig, sets: TrainingSets | None, processes: int) -> None:
    """Print what would train, how batches divide, and whether it fits into memory.

    Args:
        sets: training sets; None: they are not on this machine.

    Raises:
        ValueError: what keeps a start from running on this machine, such as a file that cannot be read. A
            plan that does not fit into memory is only reported.
    """
    from visft_ds.planner.memory import plan_largest  # a start does without

    data = None
    earlier = look_into(Path(config.visft.run.out or ""))
    # Missing splits are told later.
    if sets is not None and not any(True for _ in missing_shards(config.visft)):
        data = open_data(config.visft, sets)
        open_start(config.visft, data, earlier)
    vocabulary = None if data is None else data.vocabulary
    # Planning a pipeline takes no processes: without a launcher, that of one pipeline is shown.
    machine = check_machine(config, max(processes, config.pipeline_stages))
    config, machine = settle_checkpointing(config, machine, vocabulary, earlier, must_fit=False)
    run = planned_run(config, machine, vocabulary)
    module, groups = plan_model(config, run.vocabulary_size)

    plan = plan_largest(run)
    capacity = memory_of(machine.device)
    verdict = "fits into" if plan.total <= capacity else "DOES NOT FIT into"
    memory = [
        *plan.rows(),
        ("verdict", f"{verdict} {capacity / 2**20:,.0f} MiB ({machine.device.type}, {machine.precision})"),
    ]
    is_assumed = vocabulary is None and any(TASKS[task].uses_vocabulary for task in module.heads)
    note = f", with a vocabulary of {PUBLISHED_VOCABULARY:,} ids (ASSUMED)" if is_assumed else ""
    sections = _plan(config, machine, run.partition, module, groups, note=note)
    if data is not None:
        sections += _shown_by_data(config, data, module)
    sections.append(Section("predicted peak memory of a process", memory))
    print_plan(f"{_title(config)} (dry run: nothing is started)", sections)
    _check_files(config, module, knows_words=vocabulary is not None)


def _check_files(config: ResolvedConfig, module: MultiTaskModel, *, knows_words: bool) -> None:
    """Check names and shapes in the files of weights that exist. Raises ValueError."""
    weights = config.visft.model.weights
    if weights is not None and local(weights).is_file():
        open_backbone(module.backbone, local(weights))
    heads = config.visft.heads.path
    if heads is None:
        return
    for task, head in module.heads.items():
        # Without the data nobody knows the number of words of a head.
        has_shapes = knows_words or not TASKS[task].uses_vocabulary
        if has_shapes and head_files(Path(heads), task):
            open_head(heads, task).check(head)


def _title(config: ResolvedConfig) -> str:
    return f"visft_ds stage {config.visft.stage} ({stage_name(config.visft)}), {config.visft.model.name}"


def _plan(
    config: ResolvedConfig,
    machine: Machine,
    partition: Partition | None,
    module: MultiTaskModel,
    groups: Sequence[TrainedGroup],
    start: int = 0,
    note: str = "",
) -> list[Section]:
    """What is known of a run before it starts."""
    batches = machine.batches
    sections = [
        _model(config, machine, module, groups),
        _what_trains(groups, note),
        _batches(config, batches),
    ]
    if partition is not None:
        sections.append(Section("pipeline", partition.rows(batches.accumulation)))
    sections.append(_run(config, start))
    if config.decisions:
        sections.append(_decisions(config))
    return sections


def _model(
    config: ResolvedConfig, machine: Machine, module: MultiTaskModel, groups: Sequence[TrainedGroup]
) -> Section:
    model = config.visft.model
    # ZeRO-3 empties its tensors.
    total = sum(int(getattr(parameter, "ds_numel", parameter.numel())) for parameter in module.parameters())
    trained = sum(group.count for group in groups)
    facts = [
        ("backbone", f"{model.name}: {module.backbone.describe()}"),
        ("parameters", f"{total:,}, of which {trained:,} train ({100 * trained / total:.3f} %)"),
        ("precision", f"{machine.precision} ({machine.why_precision})"),
        *_attention(config, machine, module.backbone),
        ("checkpointing", f"{model.activation_checkpointing}, {machine.why_checkpointing}"),
    ]
    return Section("model", facts)


def _attention(config: ResolvedConfig, machine: Machine, backbone: Backbone) -> list[tuple[str, str]]:
    """Row that names what computes EVA's attention, and why; timm's models have their own."""
    if not isinstance(backbone, EvaViT):
        return []
    if all(stream.alike() for stream in config.visft.streams().values()):
        return [("attention", "torch's scaled_dot_product_attention (images of one size)")]
    head_width = backbone.width // backbone.config.num_heads
    kernel, why = packed_kernel(machine.device, DTYPES[machine.precision], head_width)
    return [("attention", f"packed images: {kernel} ({why})")]


def _what_trains(groups: Sequence[TrainedGroup], note: str) -> Section:
    rows = []
    for group in groups:
        numbers = (str(len(group.names)), f"{group.count:,}", f"{group.lr:g}", f"{group.weight_decay:g}")
        rows.append((group.name, *numbers, group.names[0][-42:]))
    return Section(f"what trains{note}", rows, ("group", "tensors", "params", "lr", "weight decay", "first"))


def _batches(config: ResolvedConfig, batches: Batches) -> Section:
    """Division of each batch, and shares of the steps."""
    zero = config.deepspeed["zero_optimization"]["stage"]
    if batches.stages > 1:
        engine = f"{batches.dp} pipeline(s) of {batches.stages} stages, ZeRO-{zero} between them"
        workers = "pipeline(s)"
    else:
        engine = f"ZeRO-{zero}, {batches.dp} process(es)"
        workers = "process(es)"
    rows = [("engine", engine)]
    for name, images in batches.batch_size.items():
        micro = f"micro-batch {batches.micro[name]} x accumulation {batches.accumulation}"
        rows.append(("batch", f"{name}: {images} images = {micro} x {batches.dp} {workers}"))
    streams = config.visft.streams().values()
    shares = sum(stream.share for stream in streams)
    for stream in streams:
        share = 100 * stream.share / shares
        rows.append((stream.name, f"{share:.0f} % of the steps train {', '.join(stream.tasks)}"))
    return Section("batches", rows)


def _run(config: ResolvedConfig, start: int) -> Section:
    """Length of the run, and what it writes when."""
    run = config.visft.run
    schedule = config.scheduler
    best = f" and the best by {run.keep_best}" if run.keep_best else ""
    rows = [
        ("steps", f"{config.total_steps}" + (f", from step {start}" if start else "")),
        ("schedule", f"{schedule.type}, {schedule.params.warmup_num_steps} steps of warm-up"),
        (
            "saved",
            f"every {run.save_every} steps in {run.out}/checkpoints, kept: the last {run.keep_last}{best}",
        ),
        ("evaluated", f"every {run.eval_every} steps" if run.eval_every else "not during training"),
    ]
    return Section("run", rows)


def _decisions(config: ResolvedConfig) -> Section:
    """Decisions of data and hardware, with reasons."""
    rows = []
    for key, value, why in config.decisions:
        text = str(value)
        if len(text) > _WIDEST_VALUE:  # a path, whose end tells most
            text = f"...{text[-_WIDEST_VALUE:]}"
        rows.append((f"{key} = {text}", why))
    return Section("decided by data and machine (flags come before)", rows, ("setting", "why"))


def _data(config: ResolvedConfig, data: RunData) -> Section:
    rows = []
    for name, training_set in data.sets.items():
        manifest = training_set.manifest
        where = f"{manifest}: {len(manifest)} images"
        tasks = ", ".join(training_set.tasks)
        rows.append((f"shards {name}", f"{where}, weight {training_set.weight:g}: {tasks}"))
    for task, classes in classes_of_run(config.visft, data.categories).items():
        rows.append((f"classes, {task}", f"{len(classes)}, the categories of the data by their ids"))
    for stream, plan in data.plan.tasks.items():
        for name in plan.sets:
            steps = data.plan.steps_per_epoch(stream, name)
            rows.append((f"epoch, {stream}", f"{steps} step(s) of {name}"))
    features = config.visft.features
    if features is not None:
        cached = f"kept in {features.cache}" if features.cache else "not kept (visft.features.cache)"
        rows.append(("features", f"{data.plan.views} view(s) of each image, {cached}"))
    return Section("data", rows)


def _shown_by_data(config: ResolvedConfig, data: RunData, module: MultiTaskModel) -> list[Section]:
    """A section about what stands in the way of learning, or none."""
    cells = [cell for _, cell in module.backbone.shapes]
    rows = list(lines_of(findings_of(config.visft, data, cells)))
    return [Section("what the data shows", rows)] if rows else []
