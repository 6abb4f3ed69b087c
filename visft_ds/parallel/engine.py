"""The engine that trains a prepared model: ZeRO 0-3 through `deepspeed.initialize`.

One signature for every engine: a step takes the micro-batches of this rank and reports what happened, alike
on all ranks. `train` calls it once an optimiser step; remedies for silent faults of DeepSpeed stand in
`deepspeed_fixes`.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any, Literal

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime import compiler
from deepspeed.runtime.zero import parameter_offload
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from packaging.specifiers import SpecifierSet
from torch import Tensor, nn

from visft_ds import DEEPSPEED, distributed, importing
from visft_ds.config import ResolvedConfig
from visft_ds.config.schema import SchedulerConfig
from visft_ds.data.samples import Batch
from visft_ds.model import MultiTaskModel
from visft_ds.models.timm_backbone import TimmBackbone
from visft_ds.ops import keep_freed_memory, replaced
from visft_ds.parallel.deepspeed_fixes import LossScale, clear_stale_gradients, step_without_update
from visft_ds.prepare.model import PreparedModel
from visft_ds.tasks.criterion import LossDenominators, counts_of, loss_denominators_of

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
    #: of a refused step: rank -> what it found
    faults: Mapping[int, Sequence[str]] = field(default_factory=dict)
    loss_scale: float | None = None  #: what the loss was multiplied by; None in fp32 and bf16


@dataclass(frozen=True)
class Schedule:
    """Learning-rate factor of each optimiser step: linear warm-up, then cosine, linear or constant.

    Unlike DeepSpeed's WarmupCosineLR the first step is not spent at learning rate 0.
    """

    config: SchedulerConfig
    total_steps: int

    def __call__(self, step: int) -> float:
        """Factor of the update that follows `step` finished updates."""
        kind = self.config.type
        warmup = self.config.params.warmup_num_steps
        if step < warmup:
            return (step + 1) / warmup
        if kind == "WarmupLR":
            return 1.0
        progress = min(1.0, (step - warmup) / max(1, self.total_steps - warmup))
        return 0.5 * (1 + math.cos(math.pi * progress)) if kind == "WarmupCosineLR" else 1 - progress


def start_process_group() -> None:
    """Join the process group of the launcher (nccl on GPUs, gloo on CPUs); one process meets nobody and needs
    no port.

    Raises:
        ValueError: an untested DeepSpeed release, unless VISFT_ALLOW_UNTESTED_DEEPSPEED=1; the port on which
        the
            processes meet is in use.
    """
    known = SpecifierSet(DEEPSPEED).contains(deepspeed.__version__, prereleases=True)
    if not known and not os.environ.get("VISFT_ALLOW_UNTESTED_DEEPSPEED"):
        raise ValueError(
            f"deepspeed {deepspeed.__version__} is installed; visft_ds works with {DEEPSPEED}: pip install "
            f"'deepspeed{DEEPSPEED}', or set VISFT_ALLOW_UNTESTED_DEEPSPEED=1 and run the test suite first"
        )
    deepspeed.utils.logger.setLevel(logging.ERROR)
    # DeepSpeed imports an optimizer that nothing here uses, and gets it ready to be compiled: a second.
    with importing(), replaced(compiler, "compile", lambda: compiler.dummy_decorator):
        import_module("deepspeed.runtime.zero.muon.muon_optimizer")
        import_module("torch._dynamo")  # as torch's optimizers do
    accelerator = deepspeed.accelerator.get_accelerator()
    if accelerator.device_name() == "cpu":
        # A C++ extension that only DeepSpeed's inference kernels use; building it would need a compiler and a
        # minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists
    if distributed.local_device().type == "cuda":
        torch.cuda.set_device(distributed.local_device())
    _join_alone_or_again(accelerator.communication_backend_name())
    try:
        deepspeed.init_distributed(verbose=False, auto_mpi_discovery=False)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        port = os.environ["MASTER_PORT"]
        raise ValueError(
            f"port {port}, on which the processes meet, is in use: deepspeed --master_port N"
        ) from error


def _join_alone_or_again(backend: str) -> None:
    """Join the process group where DeepSpeed goes wrong: in one process, and after a restart by torchrun."""
    if dist.is_initialized():
        return
    store: Any
    rank = distributed.rank()
    world_size = distributed.world_size()
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if world_size == 1:
        store = dist.HashStore()  # type: ignore[attr-defined]
    elif attempt != "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torchrun 2.15 keeps the store of the attempt before, with the addresses of ranks that are dead.
        address = os.environ["MASTER_ADDR"]
        port = int(os.environ["MASTER_PORT"])
        reused = dist.TCPStore(address, port, world_size, is_master=False)  # type: ignore[attr-defined]
        store = dist.PrefixStore(f"attempt {attempt}", reused)  # type: ignore[attr-defined]
    else:
        return
    timeout = deepspeed.constants.default_pg_timeout
    dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=world_size)


@contextlib.contextmanager
def released(engine: Engine) -> Iterator[Engine]:
    """The engine, whose memory is freed at the end, for a process that goes on afterwards
    (`distributed.keep_open`).

    DeepSpeed hangs hooks into autograd that keep a model for ever; under ZeRO-3 a list and a cache do so too.
    A rank that failed among others frees nothing: it would wait for collectives that they never join.
    """
    succeeded = False
    try:
        yield engine
        succeeded = True
    finally:
        if succeeded or distributed.world_size() == 1:
            engine.deepspeed.destroy()
            parameter_offload.FWD_MODULE_STACK.clear()
            cached = PartitionedParameterCoordinator._PartitionedParameterCoordinator__params_to_release
            inspect.getclosurevars(cached).nonlocals["func"].cache_clear()
            deepspeed.utils.groups.mpu = None  # of a pipeline: ZeRO would ask it for ranks


class Engine:
    """ZeRO stages 0-3, with or without offload, over a plain module.

    Args:
        module: the prepared model; trainable parameters in fp32, frozen ones in any precision.
        groups: optimiser groups: {"params", "lr", "weight_decay", "name"}.
        config: the plain DeepSpeed dict, batch keys included, without optimizer and scheduler.
        build_optimizer: groups -> optimiser. (For one named in `config` DeepSpeed would compile an
        extension.)
        schedule: learning-rate factor of each step.
        seed: with the step and the rank it decides every random number (dropout) of a step.
        inside: what DeepSpeed runs in place of the module.

    Attributes:
        accumulation: micro-batches of an optimiser step on this rank.
        stage: of ZeRO.
        deepspeed: DeepSpeed's engine, which this one drives.
        holders: parameter -> the rank that reads it for checkpoints, where that is not 0.
        should_update: decides, from the mean loss of the global batch, if a step may change the weights. It
        has to
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
        self.holders: Mapping[str, int] = {}
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
        for buffer in module.buffers():  # under ZeRO-3 DeepSpeed leaves them on the host
            buffer.data = buffer.data.to(self.device)
        self.accumulation: int = self.deepspeed.gradient_accumulation_steps()
        self.stage: int = self.deepspeed.zero_optimization_stage()
        if isinstance(module.backbone, TimmBackbone):
            module.backbone.one_by_one = self.stage == 3
        scaler = getattr(self.deepspeed.optimizer, "torch_autocast_gradscaler", None)
        scaler = scaler or self.deepspeed.torch_autocast_z0_gradscaler
        self.loss_scale = LossScale(self.deepspeed, scaler) if scaler else None  # None in fp32 and bf16
        self.should_update: Callable[[float], bool] = math.isfinite
        #: Most losses of a step: the sum, of each task its weighted, unweighted and logged ones.
        self._most_losses = 1 + sum(
            1 + len(criterion.weights) + _LOGGED for criterion in module.criteria.values()
        )
        self._sums: dict[str, Tensor] = {}  # losses of a step on this rank, means over its micro-batches

    def agree_on_step(
        self, what: str, batches: Sequence[Batch], micro_batches: int, *, stop: bool = False
    ) -> tuple[LossDenominators, bool]:
        """What losses of a step are divided by, which has so many micro-batches over all ranks, and if some
        rank is to stop; see `distributed.agree_on_step`. Collective.
        """
        counts = counts_of(self.module.criteria, batches)
        summed, stopping = distributed.agree_on_step(what, counts, stop, self.device)
        return loss_denominators_of(summed, micro_batches, self.device), stopping

    def train_step(
        self, step: int, batches: Sequence[Batch], loss_denominators: LossDenominators
    ) -> StepReport:
        """Run an optimiser step over this rank's micro-batches (as many as `accumulation`).

        Of a refused step every rank learns the faults that the others have found.
        """
        # For dropout: a function of the step alone, so that a resumed run draws the same.
        torch.manual_seed(((self.seed * 1_000_003 + step) * 4_099 + distributed.rank()) % (1 << 63))
        clear_stale_gradients(self.deepspeed.optimizer)
        self.module.faults = []
        groups = self.deepspeed.optimizer.param_groups
        rates = {name: group["lr"] for name, group in zip(self.group_names, groups, strict=True)}
        scale = self.loss_scale.value if self.loss_scale else None
        self._sums = {}
        losses, norm, accepted = self._step(step, batches, loss_denominators)
        refused: Refused = "loss"
        if accepted:
            overflow = not math.isfinite(norm)
            if self.loss_scale:
                self.loss_scale.move(overflow=overflow)
            refused = "gradient" if overflow and scale is None else ""
        faults: dict[int, Sequence[str]] = {}
        if refused:
            bad = [f"{name} is {float(value)}" for name, value in self._sums.items() if not value.isfinite()]
            everywhere = distributed.from_all_ranks([*(self.module.faults or ()), *bad])
            faults = {rank: texts for rank, texts in enumerate(everywhere) if texts}
            losses = {"loss": losses["loss"]}
        skipped = not refused and not math.isfinite(norm)
        return StepReport(losses, norm / (scale or 1.0), rates, skipped, refused, faults, scale)

    def _step(
        self, step: int, batches: Sequence[Batch], loss_denominators: LossDenominators
    ) -> tuple[Mapping[str, float], float, bool]:
        """Compute a step, and make the update unless loss or gradient are refused, alike on every rank.

        Returns:
            Means of the losses over all ranks; the norm of the gradient, still multiplied by the loss scale,
            inf where it is unknown; and if `should_update` accepted the loss.
        """
        assert len(batches) == self.accumulation, (len(batches), self.accumulation)
        self.module.train()
        for number, batch in enumerate(batches, 1):
            losses = self.deepspeed(batch.to(self.device), loss_denominators)
            self.deepspeed.backward(losses["loss"])
            self._add(losses)
            if number < len(batches):
                self.deepspeed.step()  # only counts the micro-batch
        means = distributed.mean_losses(self._sums, self._most_losses)
        accepted = self.should_update(means["loss"])
        norm = math.inf
        if self.stage == 0:  # which keeps no norm
            gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
            norm = float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0
        if not accepted or (self.stage == 0 and not math.isfinite(norm)):
            step_without_update(self.deepspeed, self.stage, self.deepspeed.step)
        else:
            self.deepspeed.step()
        if accepted and self.stage:
            norm = float(self.deepspeed.get_global_grad_norm())  # inf where DeepSpeed skipped the update
        return means, norm, accepted

    def _add(self, losses: Mapping[str, Tensor]) -> None:
        """Take in the losses of a micro-batch."""
        for name, value in losses.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.detach() / self.accumulation

    @torch.no_grad()
    def predict(self, batch: Batch) -> dict[str, Any]:
        """Every head's output for a batch, in evaluation mode. Under ZeRO-3 all ranks must call it together.

        There, outputs may go on behind the batch's last image: ranks that cut images into windows have more
        or fewer.
        """
        self.module.eval()
        if self.module.backbone.one_by_one:  # an image is a call, and every rank has to make as many
            count = len(batch.sizes)
            most = max(distributed.from_all_ranks(count))
            if most > count:
                batch = batch.of_images(torch.arange(most).clamp(max=count - 1))
        return dict(self.deepspeed(batch.to(self.device)))


def build_engine(
    prepared: PreparedModel,
    config: ResolvedConfig,
    deepspeed_config: dict[str, Any],
    bounds: Sequence[int] | None,
) -> Engine:
    """The engine of a prepared model: a pipeline where stages have bounds, else ZeRO over the whole model.

    Args:
        deepspeed_config: from `deepspeed_dict`.
        bounds: first layer of each pipeline stage, and the number of layers.
    """
    groups = [
        {
            "name": group.name,
            "params": list(group.parameters),
            "lr": group.lr,
            "weight_decay": group.weight_decay,
        }
        for group in prepared.groups
    ]
    kind: Callable[..., Engine] = Engine
    if bounds is not None:
        from visft_ds.parallel.pipeline import PipelineEngine

        kind = partial(PipelineEngine, bounds=bounds)
    engine = kind(
        prepared.module,
        groups,
        deepspeed_config,
        build_optimizer=partial(torch.optim.AdamW, **config.optimizer.params.model_dump()),
        schedule=Schedule(config.scheduler, config.total_steps),
        seed=config.visft.seed,
    )
    keep_freed_memory(engine.device)
    return engine
