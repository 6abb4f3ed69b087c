"""Training state in and out of an engine, free of any topology: every trainable tensor whole, by its plain name.

DeepSpeed's own accessors have gaps in 0.19.8 (only the first parameter group is found, the ZeRO-3 setter needs sizes
divisible by the world size, low-precision copies are not rewritten); each is closed here, next to the call it concerns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from visft_ds.parallel import distributed
from visft_ds.parallel.engine import Engine, grad_scaler

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class EngineState:
    """Everything an optimiser carries from step to step."""

    parameters: Mapping[str, Tensor]  #: name -> fp32 master value, on the CPU
    moments: Mapping[str, Mapping[str, Tensor]]  #: "exp_avg" | "exp_avg_sq" -> name -> fp32, on the CPU
    updates: int  #: optimiser updates done; position of Adam's bias correction and of the schedule
    loss_scale: Mapping[str, float] = field(default_factory=dict)  #: dynamic loss scale of fp16 runs


def trainable(engine: Engine) -> dict[str, nn.Parameter]:
    """Parameters that train, by qualified name, in the module's order."""
    return {name: p for name, p in engine.module.named_parameters() if p.requires_grad}


def gather_state(engine: Engine) -> EngineState | None:
    """Collect the whole training state on the main process; None on the others. Collective, after >= 1 step."""
    base = _base_optimizer(engine)
    _relink(engine)
    parameters: dict[str, Tensor] = {}
    moments: dict[str, dict[str, Tensor]] = {key: {} for key in MOMENTS}
    for name, parameter in trainable(engine).items():
        if parameter.is_meta:
            tensors = {}
        elif engine.stage == 0:
            tensors = {"value": parameter.detach(), **{key: base.state[parameter][key] for key in MOMENTS}}
        else:
            tensors = {"value": safe_get_full_fp32_param(parameter)}
            tensors |= {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
        tensors = engine.bring_to_main(name, tensors)
        if distributed.is_main():  # the copies of the other ranks are dropped at once: one tensor at a time
            parameters[name] = _to_host(tensors["value"])
            for key in MOMENTS:
                moments[key][name] = _to_host(tensors[key])
    if not distributed.is_main():
        return None
    updates = engine.deepspeed.global_steps - engine.deepspeed.skipped_steps
    return EngineState(parameters, moments, updates, _loss_scale(engine))


def gather_parameters(engine: Engine, names: tuple[str, ...] | None = None) -> dict[str, Tensor]:
    """Current values of parameters on the main process (empty elsewhere), frozen ones too. Collective.

    Args:
        names: which; all trainable ones by default.
    """
    chosen = dict(engine.module.named_parameters())
    wanted = trainable(engine) if names is None else {name: chosen[name] for name in names}
    values: dict[str, Tensor] = {}
    for name, parameter in wanted.items():
        value = safe_get_full_fp32_param(parameter) if engine.stage == 3 and parameter.requires_grad else None
        if value is None and not parameter.is_meta:
            value = _gathered(parameter)
        tensors = engine.bring_to_main(name, {} if value is None else {"value": value})
        if distributed.is_main():
            values[name] = _to_host(tensors["value"])
    return values


def restore_state(engine: Engine, state: EngineState, step: int) -> None:
    """Put a state back. Every rank passes the same state; `step` counts optimiser steps including skipped ones.

    Raises:
        ValueError: names or shapes differ from what trains here.
    """
    expected = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in trainable(engine).items()}
    found = {name: tuple(value.shape) for name, value in state.parameters.items()}
    if expected != found:
        differing = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        lines = [f"  {n}: here {expected.get(n)}, in the checkpoint {found.get(n)}" for n in differing[:8]]
        raise ValueError(
            f"the checkpoint trains something else: {len(differing)} tensors differ (another LoRA rank, other "
            "targets, tasks or head sizes?)\n" + "\n".join(lines)
        )
    _create_moments(engine, state.updates)
    for name, parameter in trainable(engine).items():
        if parameter.is_meta:  # another pipeline stage has it
            continue
        tensors = {key: state.moments[key][name] for key in MOMENTS}
        if engine.stage == 0:
            _restore_dense(engine, parameter, state.parameters[name], tensors, state.updates)
        elif engine.stage == 3:
            _restore_partition(parameter, state.parameters[name], tensors)
        else:
            device = engine.device if parameter.is_cuda else parameter.device
            safe_set_full_fp32_param(parameter, state.parameters[name].to(device))
            for key, value in tensors.items():
                safe_set_full_optimizer_state(parameter, value.to(device), key)
    _refresh_module(engine)
    scheduler = engine.deepspeed.lr_scheduler
    scheduler.last_epoch = state.updates
    for group, base_lr, factor in zip(
        engine.deepspeed.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
    ):
        group["lr"] = base_lr * factor(state.updates)
    engine.deepspeed.global_steps = step
    engine.deepspeed.skipped_steps = step - state.updates
    scaler = grad_scaler(engine.deepspeed)
    if scaler is not None and state.loss_scale:
        scaler.load_state_dict(dict(state.loss_scale))


def _base_optimizer(engine: Engine) -> Any:
    """The torch optimiser inside DeepSpeed's wrapper (ZeRO-0 has no wrapper)."""
    return getattr(engine.deepspeed.optimizer, "optimizer", engine.deepspeed.optimizer)


def _relink(engine: Engine) -> None:
    """Let the accessors find the moments of every group: DeepSpeed links those of the first group only."""
    optimizer = engine.deepspeed.optimizer
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def _flat_parameters(engine: Engine) -> list[Tensor]:
    """The flat fp32 partitions the wrapped optimiser really steps."""
    partitions = getattr(engine.deepspeed.optimizer, "fp32_partitioned_groups_flat", None)
    return partitions or [p for group in _base_optimizer(engine).param_groups for p in group["params"]]


def _create_moments(engine: Engine, updates: int) -> None:
    """Adam makes its state in its first step; a resumed run needs it before."""
    if engine.stage == 0:
        return
    base = _base_optimizer(engine)
    for flat in _flat_parameters(engine):
        base.state[flat].update(
            step=torch.tensor(float(updates)), **{key: torch.zeros_like(flat.detach()) for key in MOMENTS}
        )
    _relink(engine)


def _restore_dense(
    engine: Engine, parameter: nn.Parameter, value: Tensor, moments: Mapping[str, Tensor], updates: int
) -> None:
    with torch.no_grad():
        parameter.copy_(value)
    _base_optimizer(engine).state[parameter] = {
        "step": torch.tensor(float(updates)),
        **{key: moment.to(parameter.device) for key, moment in moments.items()},
    }


def _restore_partition(parameter: Any, value: Tensor, moments: Mapping[str, Tensor]) -> None:
    """ZeRO-3: hand every rank its own padded slice (the full setter hangs when sizes do not divide)."""
    group = parameter.ds_process_group
    size, index, count = parameter.partition_numel(), dist.get_rank(group), dist.get_world_size(group)

    def own(whole: Tensor) -> Tensor:
        flat = whole.flatten()
        return torch.cat([flat, flat.new_zeros(size * count - flat.numel())]).narrow(0, size * index, size)

    safe_set_local_fp32_param(parameter, own(value))
    for key, moment in moments.items():
        safe_set_local_optimizer_state(parameter, own(moment), key)


def _refresh_module(engine: Engine) -> None:
    """Rewrite the module's parameters from the fp32 masters, which the setters above leave untouched."""
    optimizer = engine.deepspeed.optimizer
    if engine.stage == 3:
        for index in range(len(optimizer.fp16_groups)):
            optimizer.fp16_partitioned_groups_flat[index].data.copy_(optimizer.fp32_partitioned_groups_flat[index].data)
            optimizer._unflatten_partitioned_parameters(index)
    elif engine.stage:
        optimizer.update_lp_params()


def _loss_scale(engine: Engine) -> dict[str, float]:
    scaler = grad_scaler(engine.deepspeed)
    return {} if scaler is None else dict(scaler.state_dict())


def _gathered(parameter: nn.Parameter) -> Tensor:
    if not hasattr(parameter, "ds_id"):
        return parameter.detach()
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def _to_host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
