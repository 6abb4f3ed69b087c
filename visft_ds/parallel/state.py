"""Training state read from and written to an engine, whatever its topology: undivided tensors by parameter
name.

DeepSpeed's own accessors have gaps in 0.19.8 (only the first parameter group is found, the ZeRO-3 setter
needs sizes divisible by the world size, low-precision copies are not rewritten); each is closed here, next to
the call it concerns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from visft_ds import distributed
from visft_ds.parallel.engine import Engine
from visft_ds.tasks.channels import measured

MOMENTS = ("exp_avg", "exp_avg_sq")
#: What DeepSpeed counts as steps go by.
_COUNTED = ("micro_steps", "global_steps", "global_samples", "skipped_steps")
VALUE = "value"
#: Copies a tensor to the host as fp32, under a name that is the same at every save: "value/<name>",
#: "exp_avg/<name>".
ToHost = Callable[[str, Tensor], Tensor]


@dataclass(frozen=True)
class EngineState:
    """Everything an optimiser carries from step to step."""

    parameters: Mapping[str, Tensor]  #: name -> fp32 master value, on the CPU; and what heads have measured
    moments: Mapping[str, Tensor]  #: "exp_avg/<name>", "exp_avg_sq/<name>", fp32, on the CPU
    updates: int  #: optimiser updates done; position of Adam's bias correction and of the schedule
    loss_scale: Mapping[str, float] = field(default_factory=dict)  #: dynamic loss scale of fp16 runs


def trainable(engine: Engine) -> dict[str, nn.Parameter]:
    """Parameters that train, by qualified name, in the module's order."""
    return {name: p for name, p in engine.module.named_parameters() if p.requires_grad}


def to_host(name: str, tensor: Tensor) -> Tensor:
    """A new copy in host memory."""
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()


def gather_state(engine: Engine, keep: ToHost = to_host) -> EngineState | None:
    """Gather the training state on the main process; None on the others. Collective.

    Args:
        keep: copies each tensor to the host.
    """
    prepare_moments(engine)
    values: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    for name, parameter in trainable(engine).items():
        for what in (VALUE, *MOMENTS):
            tensor = on_main(engine, name, gather_tensor(engine, parameter, what))
            if tensor is None:  # the copies of the other ranks are dropped at once: one tensor at a time
                continue
            copied = keep(f"{what}/{name}", tensor)
            if what == VALUE:
                values[name] = copied
            else:
                moments[f"{what}/{name}"] = copied
    for name, buffer in measured(engine.module.heads).items():
        values[name] = keep(f"{VALUE}/{name}", buffer)
    if not distributed.is_main():
        return None
    scale = engine.loss_scale.state() if engine.loss_scale else {}
    return EngineState(values, moments, updates_done(engine), scale)


def updates_done(engine: Engine) -> int:
    """Optimiser updates since the start of training; steps skipped for an overflow do not count."""
    return int(engine.deepspeed.global_steps - engine.deepspeed.skipped_steps)


def restore_state(engine: Engine, state: EngineState, step: int) -> None:
    """Put a state back. Every rank passes the same state; `step` counts optimiser steps including skipped
    ones.

    Raises:
        ValueError: names or shapes differ from what trains here.
    """
    _check_shapes(engine, state)
    prepare_moments(engine, state.updates)
    for name, parameter in trainable(engine).items():
        set_tensor(engine, parameter, state.parameters[name], VALUE)
        for key in MOMENTS:
            set_tensor(engine, parameter, state.moments[f"{key}/{name}"], key)
    for name, buffer in measured(engine.module.heads).items():
        buffer.copy_(state.parameters[name])
    refresh_module(engine)
    scheduler = engine.deepspeed.lr_scheduler
    scheduler.last_epoch = state.updates
    for group, base_lr, factor in zip(
        engine.deepspeed.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
    ):
        group["lr"] = base_lr * factor(state.updates)
    engine.deepspeed.global_steps = step
    engine.deepspeed.skipped_steps = step - state.updates
    if engine.loss_scale and state.loss_scale:
        engine.loss_scale.restore(state.loss_scale)


def _check_shapes(engine: Engine, state: EngineState) -> None:
    """Raise ValueError if names or shapes of a state differ from what trains here."""
    ours = trainable(engine) | measured(engine.module.heads)
    here = {name: tuple(getattr(tensor, "ds_shape", tensor.shape)) for name, tensor in ours.items()}
    there = {name: tuple(value.shape) for name, value in state.parameters.items()}
    differing = [name for name in sorted(here.keys() | there.keys()) if here.get(name) != there.get(name)]
    if differing:
        lines = [f"\n  {n}: here {here.get(n)}, in the checkpoint {there.get(n)}" for n in differing[:8]]
        raise ValueError(
            "the checkpoint does not match this run's trainable parameters: "
            f"{len(differing)} tensors differ (another LoRA rank, other targets, tasks or head sizes?)"
            + "".join(lines)
        )


@contextmanager
def unchanged(engine: Engine) -> Iterator[None]:
    """Within, `train_step` leaves weights, moments, schedule, loss scale, counters and random numbers as they
    are.

    Everything else happens, but every step ends as one whose loss is refused. The moments, which AdamW
    allocates in its first update, exist from here on.
    """
    prepare_moments(engine)
    counted = {name: getattr(engine.deepspeed, name) for name in _COUNTED}
    ours = dict(vars(engine))  # `should_update` and counters, which a step may rebind
    with torch.random.fork_rng([engine.device] if engine.device.type == "cuda" else []):
        engine.should_update = lambda loss: False
        try:
            yield
        finally:
            for name, value in counted.items():
                setattr(engine.deepspeed, name, value)
            vars(engine).update(ours)


def base_optimizer(engine: Engine) -> Any:
    """The torch optimiser inside DeepSpeed's wrapper (ZeRO-0 has no wrapper)."""
    return getattr(engine.deepspeed.optimizer, "optimizer", engine.deepspeed.optimizer)


def prepare_moments(engine: Engine, updates: int | None = None) -> None:
    """Let every accessor find Adam's moments, which it makes in its first update only: here they are zero
    before.

    Args:
        updates: forget the moments there are, and begin anew after so many updates.
    """
    base = base_optimizer(engine)
    optimizer = engine.deepspeed.optimizer
    # What the optimiser really steps: flat partitions in ZeRO-3, else its parameters.
    stepped = getattr(optimizer, "fp32_partitioned_groups_flat", None)
    if not stepped:
        stepped = [parameter for group in base.param_groups for parameter in group["params"]]
    for tensor in stepped:
        state = base.state[tensor]
        if updates is not None or MOMENTS[0] not in state:
            state.update({key: torch.zeros_like(tensor.detach()) for key in MOMENTS})
            state["step"] = torch.tensor(float(updates or 0))
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        # DeepSpeed links the moments of the first group only.
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def gather_tensor(engine: Engine, parameter: nn.Parameter, what: str) -> Tensor | None:
    """An undivided tensor on this rank's device, fp32 where it trains; None if another stage holds it.
    Collective.
    """
    if parameter.is_meta:
        return None
    if what == VALUE:
        if engine.stage == 3 and parameter.requires_grad:
            return deepspeed.utils.safe_get_full_fp32_param(parameter)
        return gathered(parameter)
    if engine.stage:
        return deepspeed.utils.safe_get_full_optimizer_state(parameter, what)
    moment: Tensor = base_optimizer(engine).state[parameter][what]
    return moment


def gathered(parameter: nn.Parameter) -> Tensor:
    """The undivided value of a parameter as the forward reads it. Collective."""
    if not hasattr(parameter, "ds_id"):
        return parameter.detach()
    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def on_main(engine: Engine, name: str, held: Tensor | None) -> Tensor | None:
    """A tensor of a parameter on the main process, sent by the rank in `Engine.holders`; None elsewhere.
    Collective.

    Args:
        held: the undivided tensor, of the parameter's shape and dtype; None if another pipeline stage holds
        it.
    """
    source = engine.holders.get(name, 0)
    if distributed.rank() == source != 0:
        assert held is not None
        dist.send(held.detach().contiguous(), dst=0)
    if not distributed.is_main():
        return None
    if source == 0:
        return held
    like = engine.module.get_parameter(name)
    received = torch.empty(like.shape, dtype=like.dtype, device=engine.device)
    dist.recv(received, src=source)
    return received


@torch.no_grad()
def set_tensor(engine: Engine, parameter: Any, tensor: Tensor, what: str = VALUE) -> None:
    """Write this rank's part of an undivided fp32 tensor; the forward's low-precision copies stay as they
    are.
    """
    if parameter.is_meta:  # another pipeline stage holds it
        return
    if engine.stage == 0:
        target = parameter if what == VALUE else base_optimizer(engine).state[parameter][what]
        target.copy_(tensor)
    elif engine.stage == 3:  # a padded slice for every rank: the full setter hangs when sizes do not divide
        group = parameter.ds_process_group
        size = parameter.partition_numel()
        flat = tensor.flatten()
        padded = F.pad(flat, (0, size * dist.get_world_size(group) - flat.numel()))
        shard = padded.narrow(0, size * dist.get_rank(group), size)
        if what == VALUE:
            deepspeed.utils.safe_set_local_fp32_param(parameter, shard)
        else:
            deepspeed.utils.safe_set_local_optimizer_state(parameter, shard, what)
    elif what == VALUE:
        deepspeed.utils.safe_set_full_fp32_param(parameter, tensor)
    else:
        deepspeed.utils.safe_set_full_optimizer_state(parameter, tensor, what)


def refresh_module(engine: Engine) -> None:
    """Rewrite the low-precision copies that the forward reads from the fp32 values. Collective."""
    optimizer = engine.deepspeed.optimizer
    if engine.stage == 3:
        for index in range(len(optimizer.fp16_groups)):
            optimizer.fp16_partitioned_groups_flat[index].data.copy_(
                optimizer.fp32_partitioned_groups_flat[index].data
            )
            optimizer._unflatten_partitioned_parameters(index)
        if persistent := optimizer.persistent_parameters:
            # Small ones stay gathered from step to step, and what is there is not gathered again.
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)
    elif engine.stage:
        optimizer.update_lp_params()
