"""Moving average of the trained parameters, in fp32.

The moving average lives in the same layout as the optimiser's fp32 values, so each rank averages its own part and every
ZeRO stage is served alike. To read it by name it changes places with the values for a moment.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from visft_ds.parallel.engine import Engine
from visft_ds.parallel.state import (
    VALUE,
    EngineState,
    ToHost,
    flat_parameters,
    gather_state,
    gather_tensor,
    on_main,
    set_tensor,
    to_host,
    trainable,
    updates_done,
)


class MovingAverage:
    """Exponential moving average of everything that trains, fp32. Starts at the values the engine has now.

    After n updates the decay is min(decay, (n + 1) / (n + 10)), so that a short run is not an average of its start:
    https://www.tensorflow.org/api_docs/python/tf/train/ExponentialMovingAverage.

    Args:
        decay: share of the old average in the new one, 0 to 1 (excluded); 0.999 looks back about 1,000 updates.
    """

    def __init__(self, engine: Engine, decay: float) -> None:
        self.decay = decay
        self._engine = engine
        self._values = [flat.detach().clone() for flat in flat_parameters(engine)]
        self._updates = updates_done(engine)

    def update(self) -> None:
        """Follow the step that was just made; one that the optimiser skipped changes nothing."""
        updates = updates_done(self._engine)
        if updates == self._updates:
            return
        self._updates = updates
        move = get_ema_multi_avg_fn(min(self.decay, (updates + 1) / (updates + 10)))
        move(self._values, flat_parameters(self._engine), updates)

    def gather(self, keep: ToHost = to_host) -> dict[str, Tensor]:
        """The average by qualified name on the main process, empty elsewhere. Collective."""
        found: dict[str, Tensor] = {}
        with self._in_place():
            for name, parameter in trainable(self._engine).items():
                tensor = on_main(self._engine, name, gather_tensor(self._engine, parameter, VALUE))
                if tensor is not None:
                    found[name] = keep(f"average/{name}", tensor)
        return found

    def restore(self, values: Mapping[str, Tensor]) -> None:
        """Take up the average of a checkpoint, after its state was restored; without one, start at the values."""
        self._updates = updates_done(self._engine)
        self._values = [flat.detach().clone() for flat in flat_parameters(self._engine)]
        if not values:
            return
        with self._in_place():
            for name, parameter in trainable(self._engine).items():
                set_tensor(self._engine, parameter, values[name])

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for average, value in zip(self._values, flat_parameters(self._engine), strict=True):
            held = value.clone()
            value.copy_(average)
            average.copy_(held)


def gather_all(engine: Engine, average: MovingAverage | None, keep: ToHost = to_host) -> EngineState | None:
    """`gather_state` with the moving average in it, where there is one."""
    state = gather_state(engine, keep)
    values = average.gather(keep) if average else {}
    return state and replace(state, average=values)
