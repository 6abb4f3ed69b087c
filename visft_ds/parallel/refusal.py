"""Making no update: DeepSpeed's own way of passing over a step, taken on every rank whatever the precision.

DeepSpeed 0.19.8 passes over a step by itself where the norm of the gradient is not finite, but not under ZeRO-0, where
the weights become NaN, and never because of a loss. Under fp16 autocast it then forgets to lower the loss scale (ZeRO
1-3), so that every later step overflows as well, or moves the schedule on (ZeRO-0).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def step_without_update(engine: Any, stage: int, step: Callable[[], None]) -> None:
    """End an optimiser step as `step` does, without an update; gradients are dropped. Collective.

    Weights, moments, schedule and loss scale stay as they are; the step counts as a skipped one.

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

    # The names under which the optimisers look for an overflow; an attribute of the object goes before its class's.
    if stage == 3:
        optimizer._overflow_check_and_loss_scale_update = overflow
    else:
        checks = optimizer.check_grad_overflow
        optimizer.check_grad_overflow, optimizer.check_overflow = True, overflow
    try:
        step()
    finally:
        if stage == 3:
            del optimizer._overflow_check_and_loss_scale_update
        else:
            optimizer.check_grad_overflow = checks
            del optimizer.check_overflow
