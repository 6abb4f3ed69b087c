"""The loss scale of fp16 moves once a step, and only by what all ranks know."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from visft_ds.parallel.deepspeed_fixes import LossScale


def engine(scaler: torch.amp.GradScaler | None, stage: int = 1) -> Any:
    """What `LossScale` looks at in DeepSpeed's engine."""
    return SimpleNamespace(
        optimizer=SimpleNamespace(torch_autocast_gradscaler=scaler if stage else None, clip_grad=0.5),
        torch_autocast_z0_gradscaler=None if stage else scaler,
        device=torch.device("cpu"),
        zero_optimization_stage=lambda: stage,
        gradient_clipping=lambda: 0.5,
    )


def test_it_grows_after_so_many_steps_and_falls_at_an_overflow() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)
    within = engine(scaler)
    scale = LossScale(within)
    values = []
    for overflow in (False, False, True, False, False, False, True, True):
        values.append(scale.value)
        assert scaler.get_scale() == scale.value and within.optimizer.clip_grad == 0.5 * scale.value
        scale.move(overflow=overflow)
    assert values == [8, 8, 8, 4, 4, 4, 8, 4] and scale.value == 2  # an overflow begins the count anew


def test_its_state_goes_on_elsewhere_and_other_precisions_have_none() -> None:
    scale = LossScale(engine(torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)))
    scale.move(overflow=False)
    other = LossScale(engine(torch.amp.GradScaler("cpu")))
    other.restore(scale.state())
    assert other.state() == scale.state() and other.value == 8
    other.move(overflow=False)
    other.move(overflow=False)
    assert other.value == 16
    without = LossScale(engine(None))
    without.restore(scale.state())
    without.move(overflow=True)
    assert (without.dynamic, without.value, without.state()) == (False, 1.0, {})
