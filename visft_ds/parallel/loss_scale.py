"""The dynamic loss scale of fp16: one decision for each step, from what every rank and every pipeline stage knows.

DeepSpeed 0.19.8 keeps a scaler of torch's on each rank and lets it decide after each parameter group. So the scale may
grow between two groups of one step, whose second one is then divided by twice of what it was multiplied with; it grows
after 2000 groups, not steps; and it never falls, for a step with an overflow is passed over before the scaler is asked.
Here the scaler only multiplies and divides. Whether it moves is decided from the norm of the gradient, which DeepSpeed
adds up over all ranks, those of other pipeline stages included: all of them move alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

#: Steps between two growths that the scaler itself never reaches.
_NEVER = 2**31 - 1


class LossScale:
    """The loss scale of one engine; 1 in fp32 and bf16, which have none.

    Args:
        engine: of DeepSpeed.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        scaler: torch.amp.GradScaler | None = getattr(engine.optimizer, "torch_autocast_gradscaler", None)
        self._scaler = engine.torch_autocast_z0_gradscaler if scaler is None else scaler
        self._state: dict[str, Any] = {}
        if self._scaler is not None:
            # A scaler makes its tensors when it scales a loss; pipeline stages without one divide by it all the same.
            self._scaler.scale(torch.zeros((), device=engine.device))
            self.restore(self._scaler.state_dict())

    @property
    def dynamic(self) -> bool:
        """Return True if the loss scale is dynamic."""
        return self._scaler is not None

    @property
    def value(self) -> float:
        """Factor on the loss of the next step."""
        return float(self._state.get("scale", 1.0))

    def move(self, *, overflow: bool) -> None:
        """Take note of a finished step: fall by half after an overflow, double after 2000 steps without one."""
        if self._scaler is None:
            return
        state = dict(self._state)
        state["_growth_tracker"] = 0 if overflow else state["_growth_tracker"] + 1
        if overflow:
            state["scale"] *= state["backoff_factor"]
        elif state["_growth_tracker"] >= state["growth_interval"]:
            state.update(scale=state["scale"] * state["growth_factor"], _growth_tracker=0)
        self.restore(state)

    def state(self) -> dict[str, float]:
        """State for a checkpoint; empty where there is no scale."""
        return dict(self._state)

    def restore(self, state: Mapping[str, float]) -> None:
        """Go on from a state; one of another precision has none and changes nothing."""
        if self._scaler is None or not state:
            return
        self._state = dict(state)
        self._scaler.load_state_dict({**state, "growth_interval": _NEVER, "_growth_tracker": 0})
        if self._engine.zero_optimization_stage():
            # DeepSpeed clips gradients that are still multiplied by the scale, so the bound has to be as well.
            self._engine.optimizer.clip_grad = self._engine.gradient_clipping() * self.value
