"""One rank of launchers/train.py on which, in one step, the loss of rank 1 is no number and a later one leaps on both.

RANK=0 WORLD_SIZE=2 ... python -m tests.integration.bad_step_case BAD LEAP ARGUMENTS OF launchers/train.py
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from visft_ds.launch import main
from visft_ds.parallel import distributed
from visft_ds.parallel.engine import ZeroEngine
from visft_ds.parallel.pipeline import PipelineEngine


def disturb(bad: int, leap: int) -> None:
    """From now on engines scale the loss of two steps, which count from 0."""
    for kind in (ZeroEngine, PipelineEngine):
        _disturb(kind, bad, leap)


def _disturb(kind: Any, bad: int, leap: int) -> None:
    original = kind.train_step

    def train_step(engine: Any, step: int, batches: Sequence[Any], normaliser: Any) -> Any:
        factor = float("nan") if step == bad and distributed.rank() == 1 else 1e6 if step == leap else 1.0
        weights = {task: dict(criterion.weights) for task, criterion in engine.module.criteria.items()}
        for criterion in engine.module.criteria.values():
            criterion.weights.update({name: factor * weight for name, weight in criterion.weights.items()})
        try:
            return original(engine, step, batches, normaliser)
        finally:
            for task, criterion in engine.module.criteria.items():
                criterion.weights.update(weights[task])

    kind.train_step = train_step


if __name__ == "__main__":
    disturb(int(sys.argv[1]), int(sys.argv[2]))
    sys.exit(main(sys.argv[3:]))
