"""One rank of launchers/train.py whose loss is FACTOR times as large on rank RANK in steps FIRST to LAST
(from 0).

RANK=0 WORLD_SIZE=2 ... python -m tests.train.disturbed_case FIRST LAST FACTOR RANK ARGUMENTS OF
launchers/train.py
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from visft_ds import distributed
from visft_ds.launch import main
from visft_ds.parallel.engine import Engine


def _disturb(kind: Any, factor: Callable[[int], float]) -> None:
    original = kind.train_step

    def train_step(engine: Any, step: int, batches: Sequence[Any], loss_denominators: Any) -> Any:
        weights = {task: dict(criterion.weights) for task, criterion in engine.module.criteria.items()}
        for criterion in engine.module.criteria.values():
            criterion.weights.update(
                {name: factor(step) * weight for name, weight in criterion.weights.items()}
            )
        try:
            return original(engine, step, batches, loss_denominators)
        finally:
            for task, criterion in engine.module.criteria.items():
                criterion.weights.update(weights[task])

    kind.train_step = train_step


if __name__ == "__main__":
    first, last, factor, rank = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
    _disturb(
        Engine,  # a pipeline has its `train_step`
        lambda step: factor if first <= step <= last and rank in ("all", str(distributed.rank())) else 1.0,
    )
    sys.exit(main(sys.argv[5:]))
