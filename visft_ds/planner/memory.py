"""Memory of a rank's optimiser step before anything is allocated: the model's own step on the meta device.

Activations and temporaries are those of a traced micro-batch; what the engine holds follows from numbers of
values. Libraries' workspaces, the CUDA context and fragmentation are not in it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from visft_ds import distributed
from visft_ds.config import Batches, ResolvedConfig, changed, derive_batches
from visft_ds.data.samples import Batch
from visft_ds.ops import DTYPES
from visft_ds.planner.partition import Partition, divide, operations_by_layer
from visft_ds.planner.trace import META, Tracer, Work, operators_of
from visft_ds.prepare.model import PUBLISHED_VOCABULARY, plan_model
from visft_ds.settings.fields import Precision
from visft_ds.settings.task_schema import Stream
from visft_ds.tasks import TASKS
from visft_ds.tasks.criterion import counts_of, loss_denominators_of, tensors_of
from visft_ds.tasks.task import Content

FP32 = 4  #: bytes
#: Of a GPU's memory, what a plan may fill: the CUDA context, libraries' workspaces and fragmentation take the
#: rest.
MEMORY_SHARE = 0.92

#: Of a process on a CPU beside its tensors: buffers that libraries make when they are first used, measured.
LIBRARIES = 29 * 2**20
#: The same: freed memory that the allocator keeps, in bytes of all gradients, without ZeRO and with it, whose
#: flat tensors fit in no gap that activations leave. Fitted to measured steps.
KEPT = 1.4
KEPT_BY_ZERO = 4.6


@dataclass(frozen=True)
class PlannedRun:
    """A configuration on processes of one kind."""

    config: ResolvedConfig
    batches: Batches
    precision: Precision
    vocabulary_size: int
    device: torch.device  #: which need not exist here
    content: Content = field(default_factory=Content)

    def changed(self, config: ResolvedConfig) -> PlannedRun:
        """Another configuration on the same processes. Raises ValueError: its batches cannot be divided over
        them.
        """
        return replace(self, config=config, batches=derive_batches(config, self.batches.processes))

    def with_policy(self, policy: str) -> PlannedRun:
        """The same with this `visft.model.activation_checkpointing`."""
        return self.changed(changed(self.config, [f"visft.model.activation_checkpointing={policy}"]))

    @property
    def zero(self) -> Mapping[str, Any]:
        """DeepSpeed's `zero_optimization`."""
        settings: Mapping[str, Any] = self.config.deepspeed["zero_optimization"]
        return settings

    @property
    def zero_stage(self) -> int:
        """0 to 3."""
        return int(self.zero["stage"])

    @property
    def tf32(self) -> bool:
        """True if float32 products of matrices are computed in TF32 on GPUs that have it."""
        return self.config.visft.model.computes_in_tf32(self.precision)

    @cached_property
    def partition(self) -> Partition | None:
        """Division of the layers among the stages of a pipeline; None without one."""
        stages = self.batches.stages
        if stages == 1:
            return None
        costs = self._layer_costs()
        if stages > len(costs):
            name = self.config.visft.model.name
            raise ValueError(
                f"pipeline.stages = {stages}: {name} has {len(costs)} layers; give at most as many"
            )
        return Partition(costs, divide(costs, stages))

    def _layer_costs(self) -> tuple[float, ...]:
        """Operations of each layer, mean over the streams by their shares of the steps."""
        streams = self.config.visft.streams().values()
        shares = sum(stream.share for stream in streams)
        weighted = [
            [stream.share * operations for operations in trace_step(self, stream).layers]
            for stream in streams
        ]
        return tuple(sum(layer) / shares for layer in zip(*weighted, strict=True))

    @property
    def bounds(self) -> tuple[int, ...] | None:
        """First layer of each pipeline stage, and the number of layers; None without a pipeline."""
        return None if self.partition is None else self.partition.bounds


def planned_run(
    config: ResolvedConfig,
    processes: int,
    precision: Precision,
    words: int | None,
    device: torch.device | None,
) -> PlannedRun:
    """A run with captions of so many words (None: those of the published heads) on processes' devices (None:
    this one's own). Raises ValueError: batches that cannot be divided."""
    return PlannedRun(
        config,
        derive_batches(config, processes),
        precision,
        words or PUBLISHED_VOCABULARY,
        device or distributed.local_device(),
    )


@dataclass(frozen=True)
class TracedStep:
    """A micro-batch of a stream on the whole model."""

    forward: int  #: bytes at the fullest moment before a gradient arrives, beside parameters and the batch
    backward: int  #: the same from there on
    activations: int  #: the same at any time, without gradients that have arrived at their parameters
    batch: int  #: bytes
    work: Counter[Work]
    frozen: int  #: bytes of parameters that do not train
    trained: int  #: values, of all that trains in any step
    with_gradient: int  #: values, of what this stream trains
    backbone_trains: bool
    blocks: int  #: of the backbone that are recomputed one by one, where any are
    tokens: int  #: values of the activations between two blocks
    layers: Sequence[int]  #: operations of each layer that a pipeline divides; none of timm's models


_TRACED: dict[tuple[Any, ...], TracedStep] = {}


def trace_step(run: PlannedRun, stream: Stream) -> TracedStep:
    """Forward and backward pass of a micro-batch of the whole model; cached by all it depends on."""
    visft = run.config.visft
    key = (
        visft.model_dump_json(include={"stage", "model", "lora", "heads", "param_groups"}),
        *(task.model_dump_json(include={"head", "loss"}) for task in visft.tasks.enabled().values()),
        repr(stream),
        run.batches.micro[stream.name],
        run.precision,
        run.vocabulary_size,
        run.device.type,
        run.content,
        run.zero_stage == 3,
    )
    if key not in _TRACED:
        _TRACED[key] = _trace(run, stream)
    return _TRACED[key]


def _trace(run: PlannedRun, stream: Stream) -> TracedStep:
    storage = DTYPES[run.precision]
    module, groups = plan_model(run.config, run.vocabulary_size, storage)
    module.train()
    backbone = module.backbone
    # Images are planned as large as the largest, but each as a call, or a part of a row, where sizes can
    # differ.
    backbone.one_by_one = True
    on_host = _blank_batch(run, stream)
    denominators = loss_denominators_of(counts_of(module.criteria, [on_host]), 1, META)
    batch = on_host.to(META)

    autocast = None if storage == torch.float32 else storage
    tracer = Tracer(run.device, autocast, module.parameters())
    trained = [parameter for group in groups for parameter in group.parameters]
    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(tracer.arrived)
    with (
        tracer,
        operators_of(run.device, zero3=run.zero_stage == 3),
        operations_by_layer(tracer, backbone) as layers,
    ):
        torch.autograd.backward(module(batch, denominators)["loss"])

    inputs = [batch.images, *tensors_of(batch.targets)]
    cells = math.prod(module.padded_size(on_host)) // backbone.patch_size**2
    # Our towers and timm's plain ones have blocks; of others timm recomputes stages.
    blocks = getattr(backbone, "blocks", getattr(backbone, "stages", ()))
    return TracedStep(
        forward=tracer.forward_peak,
        backward=tracer.peak,
        activations=tracer.peak_apart,
        batch=sum(tensor.nbytes for tensor in inputs if tensor.is_meta),
        work=tracer.work,
        frozen=sum(p.numel() * p.element_size() for p in module.parameters() if not p.requires_grad),
        trained=sum(p.numel() for p in trained),
        with_gradient=sum(p.numel() for p in trained if p.grad is not None),
        backbone_trains=module.train_backbone,
        blocks=len(list(blocks)),
        tokens=len(batch.images) * cells * backbone.width,
        layers=layers,
    )


def _blank_batch(run: PlannedRun, stream: Stream) -> Batch:
    """A micro-batch of images of the largest size, whose pixels and labels are on the meta device."""
    images = run.batches.micro[stream.name]
    side = stream.largest_side()
    targets = {
        task: TASKS[task].blank(images, (side, side), run.content, stream.image) for task in stream.tasks
    }
    ids = torch.arange(images)
    sizes = torch.full((images, 2), side)
    bands = run.config.visft.model.bands
    pixels = torch.empty(images, 3, side, side, dtype=torch.uint8, device=META)
    if bands is not None:
        pixels = torch.empty(images, len(bands.numbers), side, side, device=META)
    return Batch(
        pixels,
        sizes,
        sizes,
        ids,
        ids,
        ids,
        torch.ones(images, dtype=torch.bool),
        targets,
        frames=sizes,
        mixed=not stream.alike(),
    )


def model_operations(run: PlannedRun, stream: Stream) -> int:
    """Arithmetic of a rank's part of an optimiser step, nothing computed twice."""
    work = trace_step(run.with_policy("none"), stream).work
    micro_batch = sum(calls * cost.operations for cost, calls in work.items())
    return micro_batch * run.batches.accumulation // run.batches.stages


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by part at the fullest moment of a step on the fullest rank."""

    weights: int
    gradients: int
    optimizer: int
    buckets: int
    gathered: int  #: ZeRO-3: whole weights, for as long as they are needed
    activations: int  #: kept for the backward pass, temporary results, the batch
    kept: int  #: on a CPU: buffers of libraries, and freed memory that the allocator keeps

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return sum(asdict(self).values())

    def rows(self) -> list[tuple[str, str]]:
        """Rows for the parts, and the sum."""
        sizes = {name: size for name, size in asdict(self).items() if size}
        sizes["total"] = self.total
        return [(name, f"{size / 2**20:12,.1f} MiB") for name, size in sizes.items()]


def is_offloaded(zero: Mapping[str, Any], part: str) -> bool:
    """Return True if `zero_optimization` keeps the "param" or the "optimizer" in the memory of the
    machine.
    """
    settings = zero.get(f"offload_{part}") or {}
    return bool(settings.get("device", "none") != "none")


def plan_stream(run: PlannedRun, stream: Stream) -> MemoryPlan:
    """Plan of a stream's step. A pipeline's stage holds its share of the layers, and a micro-batch per later
    stage.
    """
    step = trace_step(run, stream)
    zero = run.zero
    zero_stage = run.zero_stage
    stages = run.batches.stages
    accumulation = run.batches.accumulation
    on_gpu = run.device.type != "cpu"
    ranks_of_state = run.batches.dp if zero_stage else 1  # ranks that share the state of the optimizer

    whole = step.frozen + FP32 * step.trained
    weights = whole // run.batches.dp if zero_stage == 3 else whole
    if is_offloaded(zero, "param") and on_gpu:
        weights = 0
    copies = 3 if zero_stage else 2  # both moments; under ZeRO masters of the weights, too
    optimizer = FP32 * step.trained * copies // ranks_of_state
    if is_offloaded(zero, "optimizer") and on_gpu:
        optimizer = 0
    gradients = FP32 * step.with_gradient
    if zero_stage >= 2:
        gradients = FP32 * (step.trained // ranks_of_state)

    buckets = 0
    if zero_stage:
        count = 2 if zero.get("overlap_comm") and zero_stage < 3 else 1  # one is filled, one is sent
        buckets = count * FP32 * int(zero.get("reduce_bucket_size", 5e8))
    gathered = 0
    if zero_stage == 3:
        live = int(zero.get("stage3_max_live_parameters", 1e9)) * DTYPES[run.precision].itemsize
        # What DeepSpeed fetches ahead arrives in flat buffers, of which two are still there beside what was
        # copied out of them (partition_parameters.py, `AllGatherCoalescedHandle.wait`); gloo has its own of
        # each.
        ahead = int(zero.get("stage3_prefetch_bucket_size", 5e7)) * DTYPES[run.precision].itemsize
        buffers = 2 if on_gpu else 4
        gathered = min(live, whole) + min(buffers * ahead, whole)

    kept = 0
    batches = step.batch
    update = FP32 * step.trained // ranks_of_state // stages  # a temporary tensor of all that a rank steps
    if not on_gpu:
        # The loader puts its batches where the model computes, so the prefetched ones count, too.
        batches *= (1 + run.config.visft.data.prefetch_steps) * accumulation
        update = 0
        # A buffer takes what is written into it, and that is no more than all gradients.
        buckets = min(buckets, FP32 * step.with_gradient)
        kept = LIBRARIES + int((KEPT_BY_ZERO if zero_stage else KEPT) * FP32 * step.with_gradient) // stages

    def in_flight(activations: int) -> int:
        """Bytes of the micro-batches that a stage keeps at the same time, and of their inputs."""
        return activations * min(stages, accumulation) // stages + batches

    gradients_stay = accumulation > 1 or zero_stage == 3  # gradients and buckets are there from the beginning
    backward = step.activations
    if not gradients_stay and zero_stage != 2:
        backward = max(0, step.backward - gradients)
    after = MemoryPlan(
        weights=weights // stages,
        gradients=gradients // stages,
        optimizer=optimizer // stages,
        buckets=buckets,
        gathered=gathered,
        activations=max(in_flight(backward), update),
        kept=kept,
    )
    if gradients_stay:
        return after
    before = replace(after, gradients=0, buckets=0, activations=in_flight(step.forward))
    return max(before, after, key=lambda moment: moment.total)


def plan_largest(run: PlannedRun) -> MemoryPlan:
    """Peak memory of a rank, by part, in the largest kind of step."""
    plans = [plan_stream(run, stream) for stream in run.config.visft.streams().values()]
    return max(plans, key=lambda plan: plan.total)
