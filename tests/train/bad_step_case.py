"""One rank of launchers/train.py on which, in one step, the loss of rank 1 is no number.

RANK=0 WORLD_SIZE=2 ... python -m tests.train.bad_step_case BAD ARGUMENTS OF launchers/train.py
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from visft_ds.launch import main
from visft_ds.parallel import distributed
from visft_ds.parallel.engine import Engine
from visft_ds.parallel.pipeline import PipelineEngine


def disturb(factor: Callable[[int], float]) -> None:
    """From now on engines multiply the loss of a step, which counts from 0, by `factor` of it."""
    for kind in (Engine, PipelineEngine):
        _disturb(kind, factor)


def _disturb(kind: Any, factor: Callable[[int], float]) -> None:
    original = kind.train_step

    def train_step(engine: Any, step: int, batches: Sequence[Any], loss_denominators: Any) -> Any:
        weights = {task: dict(criterion.weights) for task, criterion in engine.module.criteria.items()}
        for criterion in engine.module.criteria.values():
            criterion.weights.update({name: factor(step) * weight for name, weight in criterion.weights.items()})
        try:
            return original(engine, step, batches, loss_denominators)
        finally:
            for task, criterion in engine.module.criteria.items():
                criterion.weights.update(weights[task])

    kind.train_step = train_step


if __name__ == "__main__":
    bad = int(sys.argv[1])
    disturb(lambda step: float("nan") if step == bad and distributed.rank() == 1 else 1.0)
    sys.exit(main(sys.argv[2:]))
