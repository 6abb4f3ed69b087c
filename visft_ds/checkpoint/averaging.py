"""Averages of what trains: a moving one, kept beside the fp32 values, and that of the last checkpoints.

The moving average lives in the same layout as the optimiser's fp32 values, so each rank averages its own part and every
ZeRO stage is served alike. To read it by name it changes places with the values for a moment.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from visft_ds.checkpoint.format import newest_checkpoints
from visft_ds.parallel.engine import Engine
from visft_ds.parallel.state import (
    VALUE,
    EngineState,
    ToHost,
    flat_parameters,
    gather_state,
    on_main,
    refresh_module,
    set_whole,
    to_host,
    trainable,
    updates_done,
    whole,
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
                tensor = on_main(self._engine, name, whole(self._engine, parameter, VALUE))
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
                set_whole(self._engine, parameter, values[name])

    @contextmanager
    def used(self) -> Iterator[None]:
        """Inside the block the model computes with the average. Collective; no training step in between."""
        with self._in_place():
            refresh_module(self._engine)
            yield
        refresh_module(self._engine)

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


def average_last(folder: Path, count: int) -> dict[str, Tensor]:
    """Mean of what trained over the newest `count` whole checkpoints, by qualified name, fp32.

    Adapters are averaged factor by factor, which suits neighbours on one path (they barely differ), not adapters of
    separate runs. Damaged checkpoints are passed over and fewer than `count` averaged, both with a warning.

    Args:
        folder: <run>/checkpoints.

    Raises:
        ValueError: no whole checkpoint.
    """
    checkpoints, skipped = newest_checkpoints(folder, count)
    for line in skipped:
        print(f"warning: not averaged: {line}", file=sys.stderr, flush=True)
    if not checkpoints:
        raise ValueError(f"nothing to average: {folder} holds no whole checkpoint")
    if len(checkpoints) < count:
        print(f"warning: {count} checkpoints to average, found {len(checkpoints)}", file=sys.stderr, flush=True)
    return mean_of([checkpoint.parameters for checkpoint in checkpoints])


def mean_of(sources: Sequence[Callable[[], Mapping[str, Tensor]]]) -> dict[str, Tensor]:
    """Mean of tensors by name, fp32, summed in fp64; one source is in memory at a time.

    Raises:
        ValueError: sources with other names or shapes.
    """
    sums: dict[str, Tensor] = {}
    for number, source in enumerate(sources):
        values = source()
        if number == 0:
            sums = {name: torch.zeros(value.shape, dtype=torch.float64) for name, value in values.items()}
        if {n: v.shape for n, v in values.items()} != {n: v.shape for n, v in sums.items()}:
            raise ValueError("what is to be averaged differs in names or shapes; all must come from one run")
        for name, value in values.items():
            sums[name] += value
    return {name: (total / len(sources)).float() for name, total in sums.items()}
