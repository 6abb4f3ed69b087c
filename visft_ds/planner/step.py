"""Rehearsal of a rank's part of an optimiser step: what lives at its fullest moment, and the work it does.

Letters: B images, N tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from visft_ds.config import Batches, ResolvedConfig
from visft_ds.config.schema import Precision
from visft_ds.config.task_schema import Stream
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
from visft_ds.models.backbone import require_eva_vit
from visft_ds.parallel.partition import Partition, plan_partition
from visft_ds.parallel.pipeline_layers import HeadsLayer, pipeline_layers
from visft_ds.planner.rehearsal import DTYPES, META, blank_batch, loss_denominators_of, rehearsing
from visft_ds.planner.work import Total
from visft_ds.planner.zero import Groups, Zero, gradients_reduced
from visft_ds.prepare.model import plan_model
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

    def zero(self) -> Zero:
        """ZeRO settings of its engine: what is divided, and among how many."""
        batches = self.batches
        return Zero.of(self.config.deepspeed, batches.dp, batches.accumulation, self.device)

    def typical(self, stream: Stream) -> PlannedRun:
        """The same with images of average size, where the largest say too little of the time."""
        together = 1 if self.config.visft.model.packed else self.batches.micro[stream.name]
        side = stream.typical_side(together)
        if self.content.size is not None or side == stream.largest_side():
            return self
        return replace(self, content=replace(self.content, size=(side, side)))

    @cached_property
    def partition(self) -> Partition | None:
        """Who holds which layers of a pipeline; None without one."""
        return plan_partition(self.config, self.batches, self.vocabulary_size)


@dataclass(frozen=True)
class Rehearsed:
    """Memory of a rank, in bytes, and its work."""

    weights: int
    optimizer: int
    #: Gradients, buckets, gathered, activations, transient: of the step, of the update, of a frozen backbone's forward.
    moments: tuple[Mapping[str, int], ...]
    work: Total  #: of one micro-batch, forward and backward; the whole model's
    trained: int  #: values that train in this step, of the layers on this rank
    parameters: int  #: bytes of the whole weights of the layers on this rank
    tokens: int  #: bytes of what travels from block to block
    backbone_trains: bool


@dataclass(frozen=True)
class _Key:
    """All that a rehearsal depends on."""

    model: str
    images: int
    precision: Precision
    vocabulary_size: int
    device_type: str
    content: Content
    zero: Zero
    stage: int | None
    bounds: tuple[int, ...] | None


_KNOWN: dict[_Key, Rehearsed] = {}


def rehearse(run: PlannedRun, stream: Stream, stage: int | None = None) -> Rehearsed:
    """Rehearse a micro-batch of a stream on one rank; results are cached.

    Args:
        stage: of the pipeline; None: the whole model.
    """
    visft, bounds = run.config.visft, None if run.partition is None else run.partition.bounds
    decides = visft.model_dump_json(include={"stage", "model", "lora", "heads", "param_groups"})
    tasks = [visft.tasks.enabled()[name].model_dump_json(include={"head", "loss"}) for name in visft.tasks.enabled()]
    key = _Key(
        "".join([decides, *tasks, repr(stream.image), repr(stream.tasks)]),
        run.batches.micro[stream.name],
        run.precision,
        run.vocabulary_size,
        run.device.type,
        run.content,
        run.zero(),
        stage,
        bounds,
    )
    if key not in _KNOWN:
        _KNOWN[key] = _Rehearsal(run, stream, stage, bounds).result()
    return _KNOWN[key]


class _Rehearsal:
    """The model of a run on the meta device, with everything that a micro-batch needs."""

    def __init__(self, run: PlannedRun, stream: Stream, stage: int | None, bounds: tuple[int, ...] | None) -> None:
        self.run, self.stage, self.bounds, self.zero = run, stage, bounds, run.zero()
        visft = run.config.visft
        storage = DTYPES[run.precision]
        self.module, groups = plan_model(visft, run.config.optimizer.params, run.vocabulary_size, storage)
        self.module.train()
        self.layers = self._layers()
        held = nn.ModuleList(self.layers) if self.layers else self.module
        self.parameters = list(held.parameters())
        here = {id(parameter) for parameter in self.parameters}
        heads = [p for task in stream.tasks for p in self.module.heads[task].parameters()]
        self.used = {id(p) for p in (*self.module.backbone.parameters(), *heads)}
        own = [[p for p in group.parameters if id(p) in here] for group in groups]
        self.groups: Groups = [group for group in own if group]
        batch = blank_batch(stream, run.batches.micro[stream.name], run.content)
        self.loss_denominators = loss_denominators_of(self.module, batch)
        self.batch = batch.to(META)
        self.labels = replace(self.batch, sizes=batch.sizes)  # the heads of a pipeline ask the host for sizes

    def _layers(self) -> list[nn.Module]:
        """Those of the pipeline stage; none where the model is whole."""
        if self.bounds is None or self.stage is None:
            return []
        layers = [layer for _, layer in pipeline_layers(self.module)]
        return layers[self.bounds[self.stage] : self.bounds[self.stage + 1]]

    def result(self) -> Rehearsed:
        """Weights, state and the fullest moments."""
        zero, groups = self.zero, self.groups
        peak, work = self._forward_and_backward()
        taught = [[p for p in group if id(p) in self.used] for group in groups]
        update = zero.update([group for group in (taught if zero.stage == 0 else groups) if group], self.run.device)
        moments = [peak, *([{**update, ACTIVATIONS: 0}] if update else [])]
        if zero.stage == 3:
            whole = self._gathered()
            moments = [{**moment, GATHERED: whole} for moment in moments]
            moments += [] if self.module.train_backbone else [self._frozen_forward()]
        for moment in moments:
            moment[GRADIENTS] = moment.get(GRADIENTS, 0) + zero.standing_gradients(groups)
            moment[BUCKETS] = moment.get(BUCKETS, 0) + zero.standing_buckets()
            moment[TRANSIENT] = moment.get(TRANSIENT, 0) + self._read_ahead()
        return Rehearsed(
            weights=zero.weights(self.parameters),
            optimizer=zero.optimizer(groups),
            moments=tuple(moments),
            work=work,
            trained=sum(p.numel() for group in taught for p in group),
            parameters=sum(p.numel() * p.element_size() for p in self.parameters),
            tokens=4 * math.prod(self._tokens()) if self.bounds else 0,
            backbone_trains=self.module.train_backbone,
        )

    def _gathered(self) -> int:
        """ZeRO-3: bytes of whole weights between forward and backward pass."""
        backbone = {id(p) for p in self.module.backbone.parameters()}
        behind = [p for p in self.parameters if id(p) in self.used]
        return self.zero.gathered(behind, lambda p: self.module.train_backbone or id(p) not in backbone)

    def _frozen_forward(self) -> dict[str, int]:
        """ZeRO-3: bytes by kind while images pass through a backbone that keeps nothing but gathers its weights."""
        ledger = Ledger(META.type)
        ledger.add_all(self.module.parameters(), FROZEN)
        ledger.add_all(_tensors_of(self.batch), OTHER)
        ledger.forget_peaks()
        with rehearsing(self.run.device, self.run.precision), Allocations(ledger), torch.no_grad():
            self.module.features(self.batch)
        gathered = self.zero.ahead(self.module.backbone.parameters())
        return {ACTIVATIONS: 0, TRANSIENT: ledger.at_peak[TRANSIENT], GATHERED: gathered}

    def _read_ahead(self) -> int:
        """Bytes of the batches on the device: on a CPU, where all are read to, those that wait as well."""
        steps = 1 + self.run.config.visft.data.prefetch_steps
        count = steps * self.run.batches.accumulation if self.run.device.type == "cpu" else 1
        return count * sum(tensor.untyped_storage().nbytes() for tensor in _tensors_of(self.batch))

    def _forward_and_backward(self) -> tuple[dict[str, int], Total]:
        """Bytes by kind at the peak, and the work."""
        ledger = Ledger(META.type)
        ledger.add_all(self.module.parameters(), FROZEN)
        ledger.add_all(_tensors_of(self.batch), OTHER)
        earlier = [torch.empty(p.shape, device=META) for p in self._accumulated()]
        for parameter, gradient in zip(self._accumulated(), earlier, strict=True):
            parameter.grad = gradient
            ledger.add(gradient, GRADIENTS)
        ledger.forget_peaks()
        keeps = self.zero.linear_keeps_input
        with (
            rehearsing(self.run.device, self.run.precision, linear_keeps_input=keeps) as tracer,
            gradients_reduced(ledger, self.module, self.groups, self.zero),
            saved_tensors_counted(ledger, self.module),
            Allocations(ledger),
        ):
            if self.layers:
                self._stage_steps()
            else:
                torch.autograd.backward(self.module(self.batch, self.loss_denominators)["loss"])
        return {kind: ledger.at_peak[kind] for kind in (ACTIVATIONS, TRANSIENT, GRADIENTS, BUCKETS)}, tracer.work

    def _accumulated(self) -> Sequence[nn.Parameter]:
        """Parameters whose gradients are there from earlier micro-batches of the step."""
        whole = self.zero.stage < 2 and self.zero.accumulation > 1
        return [p for group in self.groups for p in group if id(p) in self.used] if whole else []

    def _stage_steps(self) -> None:
        """Run a stage until its first backward pass: as many forwards as there are stages behind it, and one."""
        assert self.bounds is not None and self.stage is not None
        stages = len(self.bounds) - 1
        under_way = min(stages - self.stage, self.zero.accumulation)
        trains_before = any(p.requires_grad for p in self._before())
        shape, outputs = self._tokens(), []
        # Of DeepSpeed's two buffers or more each keeps what was received last; one more tensor receives tokens, one
        # their gradients.
        idle = (self.stage > 0) * (1 + max(0, 2 - under_way)) + (self.stage < stages - 1)
        waiting = [torch.empty(shape, device=META) for _ in range(idle)]
        for _ in range(under_way):
            checksum = torch.empty(1, dtype=torch.int64, device=META)
            travelling: Any = (self.batch.images, self.batch.sizes, checksum)
            if self.stage:
                travelling = (torch.empty(shape, device=META, requires_grad=trains_before), checksum)
            for layer in self.layers:
                if isinstance(layer, HeadsLayer):
                    layer.batch, layer.loss_denominators = self.labels, self.loss_denominators
                travelling = layer(travelling)
            outputs.append(travelling)
        last = outputs[0]
        end: Tensor = last["loss"] if isinstance(last, dict) else last[0]
        if end.requires_grad:
            torch.autograd.backward(end, None if isinstance(last, dict) else torch.empty_like(end))
        waiting.clear()

    def _tokens(self) -> tuple[int, int, int]:
        """Shape (B, N, D) of what travels from block to block."""
        backbone = require_eva_vit(self.module.backbone)
        height, width = backbone.grid(self.batch.images)
        return len(self.batch.images), height * width + (backbone.cls_token is not None), backbone.width

    def _before(self) -> Iterator[nn.Parameter]:
        """Parameters of the stages in front."""
        assert self.bounds is not None and self.stage is not None
        for _, layer in pipeline_layers(self.module)[: self.bounds[self.stage]]:
            yield from layer.parameters()


def _tensors_of(batch: Batch) -> list[Tensor]:
    """Pixels and labels on the meta device."""
    values = [batch.images, *(value for targets in batch.targets.values() for value in vars(targets).values())]
    return [value for value in values if isinstance(value, Tensor) and value.is_meta]
