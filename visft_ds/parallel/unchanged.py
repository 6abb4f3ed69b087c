"""Complete steps of an engine that change nothing: they allocate what training allocates, and learn nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from visft_ds.parallel.engine import Engine
from visft_ds.parallel.state import MOMENTS, base_optimizer, ensure_moments

#: What DeepSpeed counts as steps go by. Without a scheduler it has none to move on.
_COUNTED = ("lr_scheduler", "micro_steps", "global_steps", "global_samples", "skipped_steps")


@contextmanager
def unchanged(engine: Engine) -> Iterator[None]:
    """Within, `train_step` leaves weights, moments, schedule, loss scale, counters and random numbers as they are.

    Everything else happens, the update too: in place of the optimiser's step the same operations run on the gradients,
    which are not needed any more (see `_step_over_gradients`). DeepSpeed then copies the unchanged fp32 values to where
    the forward reads them. The moments, which AdamW allocates in its first update, exist from here on.

    A gradient that is not finite makes DeepSpeed skip the update, as always. In fp16 the loss scale is 1, so that a
    scale that is still too high does not lead to that.
    """
    ensure_moments(engine)
    inside, optimizer = engine.deepspeed, base_optimizer(engine)
    counted = {name: getattr(inside, name) for name in _COUNTED}
    ours = dict(vars(engine))  # `should_update` and counters, which a step may rebind
    step, scale = optimizer.step, engine.loss_scale.state()
    with torch.random.fork_rng([engine.device] if engine.device.type == "cuda" else []):
        inside.lr_scheduler, engine.should_update = None, lambda loss: True
        optimizer.step = partial(_step_over_gradients, optimizer)
        engine.loss_scale.restore({**scale, "scale": 1.0} if scale else {})
        try:
            yield
        finally:
            optimizer.step = step
            engine.loss_scale.restore(scale)
            for name, value in counted.items():
                setattr(inside, name, value)
            vars(engine).update(ours)


def _step_over_gradients(optimizer: Any) -> None:
    """Update with gradients in the place of values and moments, which are overwritten.

    It takes the temporary memory of a real update, and none for copies.
    """
    groups, states = [], {}
    for group in optimizer.param_groups:
        gradients = [parameter.grad for parameter in group["params"] if parameter.grad is not None]
        stand_ins = [nn.Parameter(gradient) for gradient in gradients]
        for stand_in, gradient in zip(stand_ins, gradients, strict=True):
            stand_in.grad = gradient
            states[stand_in] = {"step": torch.tensor(0.0), **dict.fromkeys(MOMENTS, gradient)}
        groups += [{**group, "params": stand_ins}] if stand_ins else []
    if groups:
        imitation = type(optimizer)(groups)
        imitation.state.update(states)
        imitation.step()
