"""Memory of a rank's optimiser step before anything is allocated: the model's own step on the meta device.

Activations and temporaries are those of a traced micro-batch; what the engine holds follows from numbers of
values. Libraries' workspaces, the CUDA context and fragmentation are not in it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from visft_ds import distributed
from visft_ds.config import Batches, ResolvedConfig, changed, derive_batches
from visft_ds.data.samples import Batch
from visft_ds.models.eva_vit import EvaViT
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
_TRACED: dict[tuple[Any, ...], TracedStep] = {}  # by all that a step depends on


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
        """The same with this `visft.model.recompute`."""
        return self.changed(changed(self.config, [f"visft.model.recompute={policy}"]))

    @property
    def tf32(self) -> bool:
        """True if float32 products of matrices are computed in TF32 on GPUs that have it."""
        stated = self.config.visft.model.tf32
        return self.precision != "fp32" if stated == "auto" else stated

    @cached_property
    def partition(self) -> Partition | None:
        """Division of the layers among the stages of a pipeline; None without one."""
        stages = self.batches.stages
        if stages == 1:
            return None
        streams = self.config.visft.streams().values()
        layers = [[stream.share * cost for cost in trace_step(self, stream).layers] for stream in streams]
        costs = [
            sum(shares) / sum(stream.share for stream in streams) for shares in zip(*layers, strict=True)
        ]
        if stages > len(costs):
            name = self.config.visft.model.name
            raise ValueError(
                f"pipeline.stages = {stages}: {name} has {len(costs)} layers; give at most as many"
            )
        return Partition(tuple(costs), divide(costs, stages))

    @property
    def bounds(self) -> tuple[int, ...] | None:
        """First layer of each pipeline stage, and the number of layers; None without a pipeline."""
        return None if self.partition is None else self.partition.bounds


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
    taught: int  #: values, of what this stream trains
    backbone_trains: bool
    blocks: int  #: of the backbone that are recomputed one by one, where any are
    tokens: int  #: values of the activations between two blocks
    layers: Sequence[int]  #: operations of each layer that a pipeline divides; none of timm's models


def run_of(
    config: ResolvedConfig,
    processes: int,
    precision: Precision,
    words: int | None,
    device: torch.device | None,
) -> PlannedRun:
    """A run with captions of so many words (None: those of the published heads) on processes' devices (None:
    this one's own). Raises ValueError: batches that cannot be divided."""
    batches, device = derive_batches(config, processes), device or distributed.local_device()
    return PlannedRun(config, batches, precision, words or PUBLISHED_VOCABULARY, device)


def trace_step(run: PlannedRun, stream: Stream) -> TracedStep:
    """Forward and backward pass of a micro-batch of the whole model; cached by all it depends on."""
    visft, images = run.config.visft, run.batches.micro[stream.name]
    model = visft.model_dump_json(include={"stage", "model", "lora", "heads", "param_groups"})
    heads = tuple(task.model_dump_json(include={"head", "loss"}) for task in visft.tasks.enabled().values())
    zero3 = run.config.deepspeed["zero_optimization"]["stage"] == 3
    key = (
        model,
        heads,
        repr(stream),
        images,
        run.precision,
        run.vocabulary_size,
        run.device.type,
        run.content,
        zero3,
    )
    if key in _TRACED:
        return _TRACED[key]
    storage = DTYPES[run.precision]
    module, groups = plan_model(visft, run.config.optimizer.params, run.vocabulary_size, storage)
    module.train()
    side = stream.largest_side()
    targets = {
        task: TASKS[task].blank(images, (side, side), run.content, stream.image) for task in stream.tasks
    }
    pixels = torch.empty(images, 3, side, side, dtype=torch.uint8, device=META)
    ids, sizes, real = (
        torch.arange(images),
        torch.full((images, 2), side),
        torch.ones(images, dtype=torch.bool),
    )
    # Images are planned as large as the largest, but each as a call, or a part of a row, where sizes can
    # differ.
    module.backbone.one_by_one = True
    on_host = Batch(
        pixels, sizes, sizes, ids, ids, ids, real, targets, frames=sizes, mixed=not stream.alike()
    )
    denominators = loss_denominators_of(counts_of(module.criteria, [on_host]), 1, META)
    batch, trained = on_host.to(META), [parameter for group in groups for parameter in group.parameters]
    tracer = Tracer(run.device, None if storage == torch.float32 else storage, module.parameters())
    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(tracer.arrived)
    backbone = module.backbone
    by_layer = (
        operations_by_layer(tracer, backbone) if isinstance(backbone, EvaViT) else nullcontext(list[int]())
    )
    cells = math.prod(module.padded_size(on_host)) // backbone.patch_size**2
    with tracer, operators_of(run.device, zero3=zero3), by_layer as layers:
        torch.autograd.backward(module(batch, denominators)["loss"])
    _TRACED[key] = TracedStep(
        forward=tracer.forward_peak,
        backward=tracer.peak,
        activations=tracer.peak_apart,
        batch=sum(value.nbytes for value in (batch.images, *tensors_of(batch.targets)) if value.is_meta),
        work=tracer.work,
        frozen=sum(p.numel() * p.element_size() for p in module.parameters() if not p.requires_grad),
        trained=sum(p.numel() for p in trained),
        taught=sum(p.numel() for p in trained if p.grad is not None),
        backbone_trains=module.train_backbone,
        # Our towers and timm's plain ones have blocks; of others timm recomputes stages.
        blocks=len(list(getattr(backbone, "blocks", getattr(backbone, "stages", ())))),
        tokens=images * cells * backbone.width,
        layers=layers,
    )
    return _TRACED[key]


def model_operations(run: PlannedRun, stream: Stream) -> int:
    """Arithmetic of a rank's part of an optimiser step, nothing computed twice."""
    found = trace_step(run.with_policy("none"), stream)
    micro = sum(count * work.operations for work, count in found.work.items())
    return micro * run.batches.accumulation // run.batches.stages


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by part at the fullest moment of a step on the fullest rank."""

    weights: int
    gradients: int
    optimizer: int
    buckets: int
    gathered: int  #: ZeRO-3: whole weights, for as long as they are needed
    activations: int  #: kept for the backward pass, temporary results, the batch

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return sum(asdict(self).values())

    def rows(self) -> list[tuple[str, str]]:
        """Rows for the parts, and the sum."""
        parts = [(name, size) for name, size in asdict(self).items() if size]
        return [(name, f"{size / 2**20:12,.1f} MiB") for name, size in [*parts, ("total", self.total)]]


def is_offloaded(zero: Mapping[str, Any], what: str) -> bool:
    """Return True if `zero_optimization` keeps the "param" or the "optimizer" in the memory of the
    machine.
    """
    return (zero.get(f"offload_{what}") or {}).get("device", "none") != "none"


def plan_stream(run: PlannedRun, stream: Stream) -> MemoryPlan:
    """Plan of a stream's step. A pipeline's stage holds its share of the layers, and a micro-batch per later
    stage.
    """
    found, batches = trace_step(run, stream), run.batches
    zero = run.config.deepspeed["zero_optimization"]
    stage, stages, cpu = int(zero["stage"]), batches.stages, run.device.type == "cpu"
    divided, several = batches.dp if stage else 1, batches.accumulation > 1

    whole = found.frozen + FP32 * found.trained
    weights = whole // (batches.dp if stage == 3 else 1)
    if is_offloaded(zero, "param") and not cpu:
        weights = 0
    optimizer = FP32 * found.trained * (2 + (stage > 0)) // divided
    if is_offloaded(zero, "optimizer") and not cpu:
        optimizer = 0
    gradients = FP32 * (found.trained // divided if stage >= 2 else found.taught)
    buckets = (
        (1 + bool(zero.get("overlap_comm") and stage < 3)) * FP32 * int(zero.get("reduce_bucket_size", 5e8))
    )
    live = int(zero.get("stage3_max_live_parameters", 1e9)) * DTYPES[run.precision].itemsize
    # Batches on the device; on a CPU that is where the loader puts them, so the prefetched ones count too.
    held = found.batch * ((1 + run.config.visft.data.prefetch_steps) * batches.accumulation if cpu else 1)
    # On a GPU the update makes a temporary tensor of all that a rank steps.
    update = 0 if cpu else FP32 * found.trained // divided // stages

    def plan(activations: int, *, arrived: bool) -> MemoryPlan:
        """Plan of a moment; `arrived`: gradients are there, and the buckets that the first one has
        allocated.
        """
        return MemoryPlan(
            weights=weights // stages,
            gradients=gradients // stages * arrived,
            optimizer=optimizer // stages,
            buckets=buckets * (stage == 3 or (stage > 0 and arrived)),
            gathered=min(live, whole) if stage == 3 else 0,
            activations=max(
                activations * min(stages, batches.accumulation) // stages + held, update * arrived
            ),
        )

    if several or stage == 3:  # gradients and buckets are there from the beginning
        return plan(found.activations, arrived=True)
    later = found.activations if stage == 2 else max(0, found.backward - gradients)
    moments = plan(found.forward, arrived=False), plan(later, arrived=True)
    return max(moments, key=lambda moment: moment.total)


def plan_largest(run: PlannedRun) -> MemoryPlan:
    """Peak memory of a rank, by part, in the largest kind of step."""
    plans = [plan_stream(run, stream) for stream in run.config.visft.streams().values()]
    return max(plans, key=lambda plan: plan.total)
