"""The engine that trains a prepared model: ZeRO 0-3 through `deepspeed.initialize`.

One signature for every engine: a step takes the micro-batches of this rank and reports what happened, alike on all
ranks. `train` calls it once an optimiser step; remedies for silent faults of DeepSpeed stand in `deepspeed_fixes`.
"""

from __future__ import annotations

import contextlib
import errno
import inspect
import logging
import math
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import deepspeed
import torch
from deepspeed.runtime.zero import parameter_offload
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from packaging.specifiers import SpecifierSet
from torch import Tensor, nn
from torch.distributed import DistNetworkError, DistStoreError

from visft_ds import DEEPSPEED
from visft_ds.config.schema import OptimizerParams, SchedulerConfig
from visft_ds.data.samples import Batch
from visft_ds.model import LossDenominators, MultiTaskModel
from visft_ds.models import require_eva_vit
from visft_ds.parallel import distributed
from visft_ds.parallel.deepspeed_fixes import LossScale, clear_stale_gradients, step_without_update
from visft_ds.parallel.partition import Partition
from visft_ds.prepare.model import PreparedModel
from visft_ds.resilience.errors import LostRank

#: Environment of a process that was started without a launcher and talks to itself only; MASTER_PORT is added.
_ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
#: Most losses of a task that are for the log only.
_LOGGED = 8

Refused = Literal["", "loss", "gradient"]  #: what of a step was not accepted


@dataclass(frozen=True)
class StepReport:
    """Report of an optimiser step, equal on every rank."""

    losses: Mapping[str, float]  #: "loss" and "<task>/<name>": means over ranks and micro-batches
    gradient_norm: float  #: global L2 norm before clipping
    learning_rates: Mapping[str, float]  #: by parameter group, as used in this step
    skipped: bool  #: True when a low-precision overflow made the optimiser skip the update
    refused: Refused = ""  #: what was not accepted, so that no rank made an update
    faults: Mapping[int, Sequence[str]] = field(default_factory=dict)  #: of a refused step: rank -> what it found
    loss_scale: float | None = None  #: what the loss was multiplied by; None in fp32 and bf16


@dataclass(frozen=True)
class Schedule:
    """Learning-rate factor of each optimiser step: linear warm-up, then cosine, linear or constant.

    Unlike DeepSpeed's WarmupCosineLR the first step is not spent at learning rate 0.
    """

    kind: str  #: "WarmupCosineLR" | "WarmupDecayLR" | "WarmupLR"
    warmup_steps: int
    total_steps: int

    @classmethod
    def of(cls, config: SchedulerConfig, total_steps: int) -> Schedule:
        """The schedule that the configuration's "scheduler" describes."""
        return cls(config.type, config.params.warmup_num_steps, total_steps)

    def __call__(self, step: int) -> float:
        """Factor of the update that follows `step` finished updates."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.kind == "WarmupLR":
            return 1.0
        progress = min(1.0, (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps))
        return 0.5 * (1 + math.cos(math.pi * progress)) if self.kind == "WarmupCosineLR" else 1 - progress


def start_process_group() -> None:
    """Join the process group of the launcher (nccl on GPUs, gloo on CPUs); one process alone works too.

    Raises:
        ValueError: an untested DeepSpeed release, unless VISFT_ALLOW_UNTESTED_DEEPSPEED=1; the port on which the
            processes meet is in use.
        LostRank: another rank has ended meanwhile.
    """
    known = SpecifierSet(DEEPSPEED).contains(deepspeed.__version__, prereleases=True)
    if not known and not os.environ.get("VISFT_ALLOW_UNTESTED_DEEPSPEED"):
        raise ValueError(
            f"deepspeed {deepspeed.__version__} is installed; visft_ds works with {DEEPSPEED}: pip install "
            f"'deepspeed{DEEPSPEED}', or set VISFT_ALLOW_UNTESTED_DEEPSPEED=1 and run the test suite first"
        )
    deepspeed.utils.logger.setLevel(logging.ERROR)
    if deepspeed.accelerator.get_accelerator().device_name() == "cpu":
        # A C++ extension that only DeepSpeed's inference kernels use; building it would need a compiler and a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    for name, value in _ALONE.items():
        os.environ.setdefault(name, value)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        os.environ.setdefault("MASTER_PORT", str(probe.getsockname()[1]))
    # Torch's flight recorder, from which the watchdog names the last collective.
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "64")
    if distributed.local_device().type == "cuda":
        torch.cuda.set_device(distributed.local_device())
    try:
        deepspeed.init_distributed(verbose=False, auto_mpi_discovery=False)
    except (DistNetworkError, DistStoreError, OSError) as error:
        if "Connection was likely closed" in str(error):
            raise LostRank(f"another rank ended while the processes met at {os.environ['MASTER_ADDR']}") from error
        if "EADDRINUSE" not in str(error) and getattr(error, "errno", None) != errno.EADDRINUSE:
            raise
        port = os.environ["MASTER_PORT"]
        raise ValueError(f"port {port}, on which the processes meet, is in use: deepspeed --master_port N") from error


@contextlib.contextmanager
def environment_as_found() -> Iterator[None]:
    """Remove at the end what `start_process_group` added to the environment: a program that is started later must not
    think that a launcher started it."""
    found = set(os.environ)
    try:
        yield
    finally:
        for name in {*_ALONE, "MASTER_PORT", "TORCH_FR_BUFFER_SIZE"} - found:
            os.environ.pop(name, None)


@contextlib.contextmanager
def released(engine: Engine) -> Iterator[Engine]:
    """The engine; its memory is freed at the end where the process goes on afterwards (`distributed.keep_open`).

    DeepSpeed hangs hooks into autograd that keep a model for ever; under ZeRO-3 a list and a cache do so too. A rank
    that failed among others frees nothing: it would wait for collectives that they never join.
    """
    succeeded = False
    try:
        yield engine
        succeeded = True
    finally:
        if distributed.kept_open() and (succeeded or distributed.world_size() == 1):
            engine.deepspeed.destroy()
            parameter_offload.FWD_MODULE_STACK.clear()
            cached = PartitionedParameterCoordinator._PartitionedParameterCoordinator__params_to_release
            inspect.getclosurevars(cached).nonlocals["func"].cache_clear()
            deepspeed.utils.groups.mpu = None  # of a pipeline: ZeRO would ask it for ranks


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of the random numbers (dropout) of a step: a pure function, so that a resumed run draws the same."""
    # Differs between all steps below 1,000,003 and ranks below 4,099.
    return ((seed * 1_000_003 + step) * 4_099 + rank) % (1 << 63)


def add_losses(sums: dict[str, Tensor], losses: Mapping[str, Tensor], parts: int) -> None:
    """Add the losses of a micro-batch, one of `parts` in a step, to their means."""
    for name, value in losses.items():
        share = value.detach() / parts
        sums[name] = sums[name] + share if name in sums else share


def loss_slots(module: MultiTaskModel) -> int:
    """Room for the losses of a step: that of all tasks, of each its weighted and unweighted ones, those for the log."""
    return 1 + sum(1 + len(criterion.weights) + _LOGGED for criterion in module.criteria.values())


class Engine:
    """ZeRO stages 0-3, with or without offload, over a plain module.

    Args:
        module: the prepared model; trainable parameters in fp32, frozen ones in any precision.
        groups: optimiser groups: {"params", "lr", "weight_decay", "name"}.
        config: the plain DeepSpeed dict, batch keys included, without optimizer and scheduler.
        build_optimizer: groups -> optimiser. (For one named in `config` DeepSpeed would compile an extension.)
        schedule: learning-rate factor of each step.
        seed: with the step and the rank it decides every random number (dropout) of a step.
        inside: what DeepSpeed runs in place of the module.

    Attributes:
        accumulation: micro-batches of an optimiser step on this rank.
        stage: of ZeRO.
        deepspeed: DeepSpeed's engine, which this one drives.
        should_update: decides, from the mean loss of the global batch, if a step may change the weights. It has to
            answer alike on every rank, and to refuse what is not finite.
    """

    def __init__(
        self,
        module: MultiTaskModel,
        groups: list[dict[str, Any]],
        config: dict[str, Any],
        *,
        build_optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
        schedule: Callable[[int], float],
        seed: int,
        inside: nn.Module | None = None,
    ) -> None:
        self.module = module
        self.seed = seed
        self.group_names = [group["name"] for group in groups]
        self.deepspeed: Any
        self.deepspeed, *_ = deepspeed.initialize(
            model=module if inside is None else inside,
            model_parameters=groups,
            config=config,
            optimizer=build_optimizer,
            lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, schedule),
            dist_init_required=False,
        )
        self.device = torch.device(self.deepspeed.device)
        self.accumulation: int = self.deepspeed.gradient_accumulation_steps()
        self.stage: int = self.deepspeed.zero_optimization_stage()
        self.loss_scale = LossScale(self.deepspeed)
        self.should_update: Callable[[float], bool] = math.isfinite

    def train_step(self, step: int, batches: Sequence[Batch], loss_denominators: LossDenominators) -> StepReport:
        """Run an optimiser step over this rank's micro-batches (as many as `accumulation`)."""
        assert len(batches) == self.accumulation, (len(batches), self.accumulation)
        rates, scale = self._begin(step)
        self.module.train()
        sums: dict[str, Tensor] = {}
        for number, batch in enumerate(batches, 1):
            of_batch = self.deepspeed(batch.to(self.device), loss_denominators)
            self.deepspeed.backward(of_batch["loss"])
            add_losses(sums, of_batch, self.accumulation)
            if number < len(batches):
                self.deepspeed.step()  # only counts the micro-batch
        means = distributed.mean_losses(sums, loss_slots(self.module))
        refused, norm = self._update(means["loss"])
        return self._report(means, sums, norm, rates, scale, refused)

    def _begin(self, step: int) -> tuple[dict[str, float], float]:
        """Prepare a step: the learning rate of each group, and what the loss is multiplied by."""
        torch.manual_seed(step_seed(self.seed, step, distributed.rank()))
        clear_stale_gradients(self.deepspeed.optimizer)
        self.module.faults = []
        groups = self.deepspeed.optimizer.param_groups
        rates = {name: group["lr"] for name, group in zip(self.group_names, groups, strict=True)}
        return rates, self.loss_scale.value

    def _update(self, loss: float) -> tuple[Refused, float]:
        """Make the update unless loss or gradient are refused, alike on every rank.

        Returns what was refused, and the norm of the gradient, still multiplied by the loss scale (inf if unknown).
        """
        accepted = self.should_update(loss)
        norm = self._dense_gradient_norm() if self.stage == 0 else math.inf  # ZeRO-0 keeps no norm
        if not accepted or (self.stage == 0 and not math.isfinite(norm)):
            step_without_update(self.deepspeed, self.stage, self.deepspeed.step)
        else:
            self.deepspeed.step()
        if not accepted:
            return "loss", norm
        if self.stage:
            norm = float(self.deepspeed.get_global_grad_norm())  # inf where DeepSpeed skipped the update
        return self._judge(norm), norm

    def _judge(self, norm: float) -> Refused:
        """Return "gradient" for a norm, equal on every rank, of NaN or infinity; in fp16 only move the scale."""
        self.loss_scale.move(overflow=not math.isfinite(norm))
        return "" if self.loss_scale.dynamic or math.isfinite(norm) else "gradient"

    def _report(
        self,
        means: Mapping[str, float],
        sums: Mapping[str, Tensor],
        norm: float,
        rates: Mapping[str, float],
        scale: float,
        refused: Refused,
    ) -> StepReport:
        """Report a step. Of a refused one every rank learns the faults that the others have found. Collective."""
        skipped, faults = not refused and not math.isfinite(norm), dict[int, Sequence[str]]()
        if refused:
            here = [
                *(self.module.faults or ()),
                *(f"{name} is {float(v)}" for name, v in sums.items() if not v.isfinite()),
            ]
            everywhere = distributed.broadcast_object(distributed.gather_objects(here))
            faults = {rank: found for rank, found in enumerate(everywhere) if found}
        losses = {"loss": means["loss"]} if refused else means
        return StepReport(
            losses, norm / scale, rates, skipped, refused, faults, scale if self.loss_scale.dynamic else None
        )

    @torch.no_grad()
    def predict(self, batch: Batch) -> dict[str, Any]:
        """Every head's output for a batch, in evaluation mode. Under ZeRO-3 all ranks must call it together."""
        self.module.eval()
        return dict(self.deepspeed(batch.to(self.device)))

    def holder(self, name: str) -> int:
        """The rank that reads a parameter for checkpoints: 0, which can gather all of them, like every other rank."""
        return 0

    def _dense_gradient_norm(self) -> float:
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0


def build_engine(
    prepared: PreparedModel,
    config: dict[str, Any],
    optimizer: OptimizerParams,
    schedule: Schedule,
    *,
    seed: int,
    partition: Partition | None = None,
    compile: str = "none",
) -> Engine:
    """The engine of a prepared model: a pipeline where a partition is given, else ZeRO over the whole model.

    Args:
        config: from `deepspeed_dict`.
        optimizer: of AdamW; groups of the model may have rates of their own.
        seed: of dropout and of sampled points.
        compile: "blocks": those of the backbone run through torch.compile, which is done once for all of them.
    """
    from visft_ds.parallel.pipeline import PipelineEngine

    def build_optimizer(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, **optimizer.model_dump())

    module, groups = prepared.module, prepared.optimizer_groups()
    common: dict[str, Any] = {"build_optimizer": build_optimizer, "schedule": schedule, "seed": seed}
    engine: Engine
    if partition is None:
        engine = Engine(module, groups, config, **common)
    else:
        engine = PipelineEngine(module, groups, config, bounds=partition.bounds, **common)
    if compile == "blocks":
        require_eva_vit(module.backbone).compile_blocks()
    return engine
