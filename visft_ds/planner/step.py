"""Plan of a rank's part of an optimiser step, before anything is allocated: memory by part, and operations.

The model's own step runs on the meta device (`meta_step`), and what the engine holds is added (`zero`). Libraries'
workspaces, the CUDA context and fragmentation are not in it.

Letters: B images, N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from visft_ds.config import Batches, ResolvedConfig, changed, derive_batches
from visft_ds.config.schema import Precision
from visft_ds.config.task_schema import Stream
from visft_ds.costs.hardware import DTYPES
from visft_ds.costs.ledger import (
    ACTIVATIONS,
    BUCKETS,
    FROZEN,
    GATHERED,
    GRADIENTS,
    OTHER,
    TRANSIENT,
    Allocations,
    Ledger,
    saved_tensors_counted,
)
from visft_ds.data.samples import Batch
from visft_ds.model import MultiTaskModel
from visft_ds.models import require_eva_vit
from visft_ds.parallel import distributed
from visft_ds.parallel.partition import Partition, plan_partition
from visft_ds.parallel.pipeline_layers import HeadsLayer, pipeline_layers
from visft_ds.planner.meta_step import META, Total, blank_batch, traced_as
from visft_ds.planner.zero import Groups, Zero, gradients_reduced
from visft_ds.prepare.model import PUBLISHED_VOCABULARY, plan_model
from visft_ds.tasks.spec import Content


@dataclass(frozen=True)
class PlannedRun:
    """A configuration on processes of one kind."""

    config: ResolvedConfig
    batches: Batches
    precision: Precision
    vocabulary_size: int
    device: torch.device
    content: Content

    def changed(self, config: ResolvedConfig) -> PlannedRun:
        """Another configuration on the same processes.

        Raises:
            ValueError: its batches cannot be divided over them.
        """
        return replace(self, config=config, batches=derive_batches(config, self.batches.processes))

    def zero(self) -> Zero:
        """ZeRO settings of its engine: what is divided, and among how many."""
        batches = self.batches
        return Zero.of(self.config.deepspeed, batches.dp, batches.accumulation, self.device)

    def alone(self) -> PlannedRun:
        """The same micro-batch of one process: its operations do not depend on the others."""
        return replace(self, batches=replace(self.batches, dp=1, accumulation=1, stages=1))

    def model_key(self, stream: Stream) -> str:
        """Text that two runs share if a stream is the same work of the same model in both."""
        visft = self.config.visft
        decides = visft.model_dump_json(include={"stage", "model", "lora", "heads", "param_groups"})
        tasks = [task.model_dump_json(include={"head", "loss"}) for task in visft.tasks.enabled().values()]
        return "".join([decides, *tasks, repr(stream.image), repr(stream.tasks), str(self.vocabulary_size)])

    @cached_property
    def partition(self) -> Partition | None:
        """Who holds which layers of a pipeline; None without one."""
        visft, batches = self.config.visft, self.batches
        if batches.stages == 1:
            return None
        streams = visft.streams()
        parts = [(self.model_key(stream), stream.share, batches.micro[name]) for name, stream in streams.items()]
        key = repr((batches.stages, parts))
        if key not in _PARTITIONS:
            module, _ = plan_model(visft, self.config.optimizer.params, self.vocabulary_size)
            lora, name = visft.lora if visft.stage == 2 else None, visft.model.name
            _PARTITIONS[key] = plan_partition(module, batches.stages, streams, batches.micro, lora=lora, name=name)
        return _PARTITIONS[key]


@dataclass(frozen=True)
class TracedStep:
    """Memory of a rank in a step, in bytes, and its operations."""

    weights: int
    optimizer: int
    #: Gradients, buckets, gathered, activations, transient: of the step, of the update, of a frozen backbone's forward.
    moments: tuple[Mapping[str, int], ...]
    work: Total  #: of one micro-batch, forward and backward; the whole model's
    trained: int  #: values that train in this step, of the layers on this rank
    backbone_trains: bool
    blocks: int  #: of the backbone that are recomputed one by one, where any are


def tokens_shape(module: MultiTaskModel, images: Tensor) -> tuple[int, int, int]:
    """Shape (B, N, D) of the activations between two blocks."""
    backbone = require_eva_vit(module.backbone)
    height, width = backbone.grid(images)
    return len(images), height * width + (backbone.cls_token is not None), backbone.width


_KNOWN: dict[tuple[Any, ...], TracedStep] = {}
_PARTITIONS: dict[str, Partition] = {}


def trace_step(run: PlannedRun, stream: Stream, stage: int | None = None) -> TracedStep:
    """Trace a micro-batch of a stream on a rank, on the meta device; results are cached by all they depend on.

    Args:
        stage: of the pipeline; None: the whole model.
    """
    bounds = None if run.partition is None else run.partition.bounds
    images, device = run.batches.micro[stream.name], run.device.type
    key = (run.model_key(stream), images, run.precision, device, run.content, run.zero(), stage, bounds)
    if key not in _KNOWN:
        _KNOWN[key] = _trace_step(run, stream, stage, bounds)
    return _KNOWN[key]


def _trace_step(run: PlannedRun, stream: Stream, stage: int | None, bounds: tuple[int, ...] | None) -> TracedStep:
    zero, device, accumulation = run.zero(), run.device, run.batches.accumulation
    module, all_groups = plan_model(
        run.config.visft, run.config.optimizer.params, run.vocabulary_size, DTYPES[run.precision]
    )
    module.train()
    every_layer = [] if bounds is None or stage is None else [layer for _, layer in pipeline_layers(module)]
    layers = [] if bounds is None or stage is None else every_layer[bounds[stage] : bounds[stage + 1]]
    parameters = list((nn.ModuleList(layers) if layers else module).parameters())
    here = {id(p) for p in parameters}
    held_here = [[p for p in group.parameters if id(p) in here] for group in all_groups]
    groups: Groups = [group for group in held_here if group]
    in_backbone = {id(p) for p in module.backbone.parameters()}
    used = in_backbone | {id(p) for task in stream.tasks for p in module.heads[task].parameters()}
    taught = [[p for p in group if id(p) in used] for group in groups]

    on_host = blank_batch(stream, run.batches.micro[stream.name], run.content)
    batch, loss_denominators = on_host.to(META), dict[str, dict[str, Tensor]]()
    for name in module.count(on_host):  # what the criteria divide by
        task, _, count = name.partition("/")
        loss_denominators.setdefault(task, {})[count] = torch.empty((), device=META)
    values = [batch.images, *(value for targets in batch.targets.values() for value in vars(targets).values())]
    inputs = [value for value in values if isinstance(value, Tensor) and value.is_meta]
    tokens = (0, 0, 0)  # shape (B, N, D) of the activations between two blocks
    if bounds:
        tokens = tokens_shape(module, batch.images)

    # Forward and backward pass. Below ZeRO-2 the gradients of earlier micro-batches of the step are there, undivided.
    ledger = Ledger(META.type)
    ledger.add_all(module.parameters(), FROZEN)
    ledger.add_all(inputs, OTHER)
    if zero.stage < 2 and accumulation > 1:
        for parameter in (p for group in taught for p in group):
            parameter.grad = torch.empty(parameter.shape, device=META)
            ledger.add(parameter.grad, GRADIENTS)
    ledger.forget_peaks()
    with (
        traced_as(device, run.precision, linear_keeps_input=zero.linear_keeps_input) as tracer,
        gradients_reduced(ledger, module, groups, zero),
        saved_tensors_counted(ledger, module),
        Allocations(ledger),
    ):
        if layers:
            assert bounds is not None and stage is not None
            labels = replace(batch, sizes=on_host.sizes)  # the heads of a pipeline ask the host for sizes
            for layer in layers:
                if isinstance(layer, HeadsLayer):
                    layer.batch, layer.loss_denominators = labels, loss_denominators
            before = [p for layer in every_layer[: bounds[stage]] for p in layer.parameters()]
            behind = len(bounds) - 1 - stage
            _until_first_backward(layers, batch, tokens, stage, behind, accumulation, before)
        else:
            torch.autograd.backward(module(batch, loss_denominators)["loss"])
    moments = [{kind: ledger.at_peak[kind] for kind in (ACTIVATIONS, TRANSIENT, GRADIENTS, BUCKETS)}]

    stepped = [group for group in (taught if zero.stage == 0 else groups) if group]
    if update := zero.update(stepped, device):
        moments.append({**update, ACTIVATIONS: 0})
    if zero.stage == 3:
        # Gathered weights are most when the forward ends; a frozen backbone's are not needed in the backward pass.
        used_here = [p for p in parameters if id(p) in used]
        gathered = zero.gathered(used_here, lambda p: module.train_backbone or id(p) not in in_backbone)
        moments = [{**moment, GATHERED: gathered} for moment in moments]
        if not module.train_backbone:  # a frozen backbone keeps no activations, but its weights are gathered
            frozen = Ledger(META.type)
            frozen.add_all(module.parameters(), FROZEN)
            frozen.add_all(inputs, OTHER)
            frozen.forget_peaks()
            with traced_as(device, run.precision), Allocations(frozen), torch.no_grad():
                module.features(batch)
            ahead = zero.ahead(module.backbone.parameters())
            moments.append({ACTIVATIONS: 0, TRANSIENT: frozen.at_peak[TRANSIENT], GATHERED: ahead})
    # Batches on the device; on a CPU that is where the loader puts them, so the prefetched ones count too.
    held = (1 + run.config.visft.data.prefetch_steps) * accumulation if device.type == "cpu" else 1
    held *= sum(tensor.untyped_storage().nbytes() for tensor in inputs)
    for moment in moments:
        moment[GRADIENTS] = moment.get(GRADIENTS, 0) + zero.standing_gradients(groups)
        moment[BUCKETS] = moment.get(BUCKETS, 0) + zero.standing_buckets()
        moment[TRANSIENT] = moment.get(TRANSIENT, 0) + held
    return TracedStep(
        weights=zero.weights(parameters),
        optimizer=zero.optimizer(groups),
        moments=tuple(moments),
        work=tracer.work,
        trained=sum(p.numel() for group in taught for p in group),
        backbone_trains=module.train_backbone,
        # Our towers and timm's plain ones have blocks; of others timm recomputes stages.
        blocks=len(list(getattr(module.backbone, "blocks", getattr(module.backbone, "stages", ())))),
    )


def _until_first_backward(
    layers: Sequence[nn.Module],
    batch: Batch,
    tokens: tuple[int, int, int],
    stage: int,
    behind: int,
    accumulation: int,
    before: Sequence[nn.Parameter],
) -> None:
    """Run a pipeline stage up to its first backward pass: a forward for each later stage, and one more.

    Args:
        tokens: shape (B, N, D) of the activations between two blocks.
        before: parameters of the earlier stages.
    """
    under_way, outputs = min(behind, accumulation), list[Any]()
    trains_before = any(p.requires_grad for p in before)
    # Of DeepSpeed's two buffers or more each keeps what was received last; one more tensor receives tokens, one their
    # gradients.
    idle = (stage > 0) * (1 + max(0, 2 - under_way)) + (behind > 1)
    waiting = [torch.empty(tokens, device=META) for _ in range(idle)]
    for _ in range(under_way):
        checksum = torch.empty(1, dtype=torch.int64, device=META)
        travelling: Any = (batch.images, batch.sizes, checksum)
        if stage:
            travelling = (torch.empty(tokens, device=META, requires_grad=trains_before), checksum)
        for layer in layers:
            travelling = layer(travelling)
        outputs.append(travelling)
    last = outputs[0]
    end: Tensor = last["loss"] if isinstance(last, dict) else last[0]
    if end.requires_grad:
        torch.autograd.backward(end, None if isinstance(last, dict) else torch.empty_like(end))
    waiting.clear()


# ------------------------------------------------------------------------------------------------------- memory


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by part at the fullest moment of a step on the fullest rank."""

    weights: int  #: frozen and trained, what this rank holds between steps
    gradients: int
    optimizer: int  #: moments, and fp32 masters where the engine divides them
    buckets: int  #: in which ZeRO collects gradients
    gathered: int  #: ZeRO-3: gathered weights for as long as they are needed
    activations: int  #: kept for the backward pass
    transient: int  #: temporary results, criteria, the batch itself

    @property
    def total(self) -> int:
        """All parts."""
        return sum(asdict(self).values())

    def rows(self) -> list[tuple[str, str]]:
        """Rows for the parts, and the sum."""
        parts = [(name, size) for name, size in asdict(self).items() if size]
        return [(name, f"{size / 2**20:12,.1f} MiB") for name, size in [*parts, ("whole", self.total)]]


def plan_largest(run: PlannedRun, task: str | None = None) -> MemoryPlan:
    """Peak memory of a rank, by part: of a stream, or of the largest one of the run."""
    streams = run.config.visft.streams()
    chosen = streams.values() if task is None else [streams[task]]
    return max((plan_stream(run, stream) for stream in chosen), key=lambda plan: plan.total)


def run_of(
    config: ResolvedConfig,
    world_size: int,
    precision: Precision,
    vocabulary_size: int | None,
    device: torch.device | None,
    content: Content | None = None,
) -> PlannedRun:
    """Run to be planned.

    Args:
        world_size: number of processes.
        precision: what visft.model.precision means on the device; never "auto".
        vocabulary_size: of the captions; None: that of the published heads.
        device: where ranks compute, which need not exist here; None: this process's own.
        content: of the micro-batches; None: more than most have.

    Raises:
        ValueError: batches that cannot be divided.
    """
    return PlannedRun(
        config=config,
        batches=derive_batches(config, world_size),
        precision=precision,
        vocabulary_size=vocabulary_size or PUBLISHED_VOCABULARY,
        device=device or distributed.local_device(),
        content=content or Content(),
    )


def model_operations(run: PlannedRun, stream: Stream) -> int:
    """Arithmetic of a rank's part of an optimiser step on typical images, nothing computed twice."""
    plain = run.changed(changed(run.config, ["visft.model.recompute=none"]))
    micro = sum(count * work.operations for work, count in trace_step(plain.alone(), stream).work.items())
    return micro * run.batches.accumulation // run.batches.stages


def plan_stream(run: PlannedRun, stream: Stream) -> MemoryPlan:
    """The fullest moment of a stream's step, on the fullest pipeline stage."""
    stages = range(run.batches.stages) if run.batches.stages > 1 else [None]
    plans = [
        MemoryPlan(
            weights=found.weights,
            gradients=moment[GRADIENTS],
            optimizer=found.optimizer,
            buckets=moment[BUCKETS],
            gathered=moment.get(GATHERED, 0),
            activations=moment[ACTIVATIONS],
            transient=moment[TRANSIENT],
        )
        for found in (trace_step(run, stream, stage) for stage in stages)
        for moment in found.moments
    ]
    return max(plans, key=lambda plan: plan.total)
