"""The memory of a configuration before anything is allocated: bytes by part on the fullest rank.

The model's own step is rehearsed on the meta device (`rehearsal`), a part of its blocks stands for all of them, and
what the engine holds is added (`zero`). Libraries' workspaces, the CUDA context and fragmentation are not in it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from visft_ds.config import Batches, ResolvedConfig, derive_batches
from visft_ds.config.schema import Precision, VisftConfig
from visft_ds.config.task_schema import Stream
from visft_ds.multitask import MultiTaskModel
from visft_ds.parallel import distributed
from visft_ds.planner.rehearsal import META, Content, blank_batch, normaliser_of, rehearsing, store_as
from visft_ds.planner.zero import Groups, Zero, gradients_reduced
from visft_ds.profiling.ledger import (
    ACTIVATIONS,
    BUCKETS,
    FROZEN,
    GRADIENTS,
    OTHER,
    TRANSIENT,
    Allocations,
    Ledger,
    saved_tensors_counted,
)
from visft_ds.stages import PUBLISHED_VOCABULARY, plan_model

#: Periods of blocks in the two rehearsals that stand for a deeper model.
_PERIODS = (2, 3)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by part at the fullest moment of a step on the fullest rank."""

    weights: int  #: frozen and trained, what this rank holds between steps
    gradients: int
    optimizer: int  #: moments, and fp32 masters where the engine divides them
    buckets: int  #: in which ZeRO collects gradients
    gathered: int  #: ZeRO-3: whole weights for as long as they are needed
    activations: int  #: kept for the backward pass
    transient: int  #: on their way: results, criteria, the batch itself

    @property
    def total(self) -> int:
        """All parts."""
        return sum(asdict(self).values())

    def rows(self) -> list[tuple[str, str]]:
        """One line for each part, and the sum."""
        parts = [(name, size) for name, size in asdict(self).items() if size]
        return [(name, f"{size / 2**20:12,.1f} MiB") for name, size in [*parts, ("whole", self.total)]]


def plan_memory(
    config: ResolvedConfig,
    world_size: int,
    *,
    precision: Precision,
    task: str | None = None,
    vocabulary_size: int | None = None,
    device: torch.device | None = None,
    content: Content | None = None,
) -> MemoryPlan:
    """What a rank of this run holds at most.

    Args:
        world_size: number of processes.
        precision: what visft.model.precision means on the device; never "auto".
        task: or stream; None: the largest of the run's.
        vocabulary_size: of the captions; None: that of the published heads.
        device: where ranks compute, which need not exist here; None: this process's own.
        content: of the micro-batches; None: more than most have.

    Raises:
        ValueError: batches that cannot be divided, groups that match nothing, an unknown task.
    """
    batches = derive_batches(config, world_size)
    streams = config.visft.streams()
    if task is not None and task not in streams:
        raise ValueError(f"task {task!r}: this run has {', '.join(streams)}")
    chosen = streams if task is None else {task: streams[task]}
    situation = _Situation(
        config,
        batches,
        precision,
        vocabulary_size or PUBLISHED_VOCABULARY,
        device or distributed.local_device(),
        content or Content(),
    )
    return max((situation.plan(stream) for stream in chosen.values()), key=lambda plan: plan.total)


@dataclass(frozen=True)
class _Situation:
    """Everything but the stream that a plan depends on."""

    config: ResolvedConfig
    batches: Batches
    precision: Precision
    vocabulary_size: int
    device: torch.device
    content: Content

    def plan(self, stream: Stream) -> MemoryPlan:
        """The plan of one stream."""
        module, groups = self._model(self.config.visft)
        zero = Zero.of(self.config.deepspeed, self.batches.dp, self.batches.accumulation, self.device)
        parameters = list(module.parameters())
        standing = {
            "weights": zero.weights(parameters),
            "optimizer": zero.optimizer(groups),
            "gathered": 0,
        }
        moments = [
            {
                "activations": peak[ACTIVATIONS],
                "transient": peak[TRANSIENT] + peak[OTHER],
                "gradients": peak[GRADIENTS] + zero.standing_gradients(groups),
                "buckets": peak[BUCKETS] + zero.standing_buckets(),
            }
            for peak in [self._deep(stream, zero)]
        ]
        gradients, temporary = zero.update(groups, self.device)
        moments.append(
            {
                "activations": 0,
                "transient": temporary,
                "gradients": gradients,
                "buckets": zero.standing_buckets(),
            }
        )
        return MemoryPlan(**standing, **max(moments, key=lambda moment: sum(moment.values())))

    def _model(self, visft: VisftConfig) -> tuple[MultiTaskModel, Groups]:
        module, groups = plan_model(visft, self.config.optimizer.params, self.vocabulary_size)
        store_as(module, self.precision)
        module.train()
        return module, [group.parameters for group in groups]

    def _deep(self, stream: Stream, zero: Zero) -> dict[str, int]:
        """The peak of forward and backward of the whole depth, from two shallow models where blocks are alike."""
        visft = self.config.visft
        module, _ = self._model(visft)
        depth, period = module.backbone.depth, max(1, visft.model.checkpoint_every)
        few, more = (depth % period + count * period for count in _PERIODS)
        if depth <= more or len({_trained(block) for block in module.backbone.blocks}) > 1:
            return self._rehearse(visft, stream, zero)
        first, second = (self._rehearse(_with_depth(visft, count), stream, zero) for count in (few, more))
        steps = (depth - few) // period
        return {kind: first[kind] + (second[kind] - first[kind]) * steps for kind in first}

    def _rehearse(self, visft: VisftConfig, stream: Stream, zero: Zero) -> dict[str, int]:
        """Bytes by kind at the peak of one micro-batch's forward and backward; weights are not counted."""
        module, groups = self._model(visft)
        batch = blank_batch(stream, self.batches.micro[stream.name], self.content)
        normaliser = normaliser_of(module, batch)
        batch = batch.to(META)
        ledger = Ledger(META.type)
        ledger.add_all(module.parameters(), FROZEN)
        held = [batch.images, *(t for targets in batch.targets.values() for t in vars(targets).values())]
        ledger.add_all((t for t in held if isinstance(t, Tensor)), OTHER)
        ledger.forget_peaks()
        with (
            rehearsing(self.device, self.precision, linear_keeps_input=zero.linear_keeps_input),
            gradients_reduced(ledger, module, groups, zero),
            saved_tensors_counted(ledger, module),
            Allocations(ledger),
        ):
            losses = module(batch, normaliser)
            torch.autograd.backward(losses["loss"])
        return {kind: ledger.at_peak[kind] for kind in (ACTIVATIONS, TRANSIENT, OTHER, GRADIENTS, BUCKETS)}


def _trained(block: nn.Module) -> frozenset[str]:
    return frozenset(name for name, parameter in block.named_parameters() if parameter.requires_grad)


def _with_depth(visft: VisftConfig, depth: int) -> VisftConfig:
    overrides = visft.model.overrides.model_copy(update={"depth": depth})
    return visft.model_copy(update={"model": visft.model.model_copy(update={"overrides": overrides})})
