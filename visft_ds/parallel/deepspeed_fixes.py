"""Remedies for faults of DeepSpeed 0.19.8 in a step: the loss scale of fp16, updates refused, stale
gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pydantic import ValidationError

from visft_ds.config.resolve import problems

#: Steps between two growths that the scaler itself never reaches.
_NEVER = 2**31 - 1


class LossScale:
    """The dynamic loss scale of an engine in fp16.

    DeepSpeed keeps a scaler of torch's on each rank and lets it decide after each parameter group. So the
    scale may grow between two groups of one step, whose second one is then divided by twice of what it was
    multiplied with; it grows after 2000 groups, not steps; and it never falls, for a step with an overflow is
    skipped before the scaler is asked. Here the scaler only multiplies and divides. Whether the scale moves
    is decided once a step from the norm of the gradient, which DeepSpeed adds up over all ranks and pipeline
    stages: all of them move alike.

    Args:
        engine: of DeepSpeed.
        scaler: its own.
    """

    def __init__(self, engine: Any, scaler: torch.amp.GradScaler) -> None:
        self._engine = engine
        self._scaler = scaler
        # A scaler makes its tensors when it scales a loss; pipeline stages without one divide by it all the
        # same.
        scaler.scale(torch.zeros((), device=engine.device))
        self.restore(scaler.state_dict())

    @property
    def value(self) -> float:
        """Factor on the loss of the next step."""
        return float(self._state["scale"])

    def move(self, *, overflow: bool) -> None:
        """Take note of a finished step: fall by half after an overflow, double after 2000 steps without
        one.
        """
        state = dict(self._state)
        state["_growth_tracker"] = 0 if overflow else state["_growth_tracker"] + 1
        if overflow:
            state["scale"] *= state["backoff_factor"]
        elif state["_growth_tracker"] >= state["growth_interval"]:
            state.update(scale=state["scale"] * state["growth_factor"], _growth_tracker=0)
        self.restore(state)

    def state(self) -> dict[str, float]:
        """State for a checkpoint."""
        return dict(self._state)

    def restore(self, state: Mapping[str, float]) -> None:
        """Go on from a state."""
        self._state = dict(state)
        self._scaler.load_state_dict({**state, "growth_interval": _NEVER, "_growth_tracker": 0})
        if self._engine.zero_optimization_stage():
            # DeepSpeed clips gradients that are still multiplied by the scale, so the bound has to be as
            # well.
            self._engine.optimizer.clip_grad = self._engine.gradient_clipping() * self.value


def step_without_update(engine: Any, stage: int, step: Callable[[], None]) -> None:
    """End an optimiser step as `step` does, without an update; gradients are dropped. Collective.

    Weights, moments, schedule and loss scale stay as they are; the step counts as a skipped one. It is
    DeepSpeed's way of skipping a step, taken on every rank in every precision. By itself DeepSpeed skips one
    where the norm of the gradient is not finite, but not under ZeRO-0, where the weights become NaN, and
    never because of a loss; and under fp16 autocast it then forgets to lower the loss scale (ZeRO 1-3), so
    that every later step overflows as well, or advances the schedule (ZeRO-0).

    Args:
        engine: of DeepSpeed, after the backward pass of the last micro-batch.
        stage: of ZeRO.
        step: makes the engine's update.
    """
    if stage == 0:
        engine.zero_grad()
        engine.micro_steps += 1
        engine.global_steps += 1
        engine.skipped_steps += 1
        engine.global_samples += engine.train_batch_size()
        return
    optimizer = engine.optimizer

    def overflow(*_: Any, **__: Any) -> bool:
        optimizer.overflow = True
        return True

    # The names under which ZeRO-1 and 2, and ZeRO-3, look for an overflow; an attribute goes before that of
    # the class.
    checks = getattr(optimizer, "check_grad_overflow", True)
    optimizer.check_grad_overflow = True
    optimizer.check_overflow = optimizer._overflow_check_and_loss_scale_update = overflow
    try:
        step()
    finally:
        optimizer.check_grad_overflow = checks
        del optimizer.check_overflow, optimizer._overflow_check_and_loss_scale_update


def clear_stale_gradients(optimizer: Any) -> None:
    """Zero the gradients DeepSpeed kept from the last step for parameters that took no part in this one.

    Under ZeRO-3 (`grad_partitions_flat_buffer`) and under every optimiser offload (CPU copies of the
    gradients) such a parameter would silently get its previous gradient again. A no-op where there is nothing
    of the kind.
    """
    buffer = getattr(optimizer, "grad_partitions_flat_buffer", None)
    if buffer is not None:
        buffer.zero_()
    for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):
        for flat in getattr(optimizer, name, ()):
            if flat.grad is not None:
                flat.grad.zero_()
    if hasattr(optimizer, "norm_for_param_grads"):
        optimizer.norm_for_param_grads.clear()


def check_zero(zero: Mapping[str, Any]) -> None:
    """Raise ValueError for keys and values of `zero_optimization` that DeepSpeed's own schema refuses."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        DeepSpeedZeroConfig.model_validate(zero)
    except ValidationError as error:
        lines = [
            f"zero_optimization.{key}: {problem}" for key, problem in problems(error, DeepSpeedZeroConfig)
        ]
        raise ValueError("\n".join(lines)) from error
