"""One rank of a run with steps in between that may not change anything: it has to be the run without them.

RANK=0 WORLD_SIZE=2 ... python -m tests.parallel.unchanged_case OUT.pt ENGINE PRECISION,...
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Any

import torch

from tests.checkpoint.matrix_case import start
from tests.parallel.engine_case import STEPS, Feed
from visft_ds.parallel import distributed
from visft_ds.parallel.engine import start_process_group
from visft_ds.parallel.state import gather_state, unchanged, updates_done

#: Before these steps others are made without a trace; at 0 there are no moments yet.
BEFORE = (0, 4)
#: One of each task, and one of all.
MADE = (0, 1, 2, 3)


def trained(engine: Any, feed: Feed, before: tuple[int, ...]) -> dict[str, Any]:
    """Train; what the main process knows of every step and of the end."""
    reports, seen, updates = [], [], []
    for step in range(STEPS):
        if step in before:
            torch.manual_seed(step)
            with unchanged(engine):
                made = [engine.train_step(one, *feed(engine, one)) for one in MADE]
            assert not engine.should_update(float("nan")), "the next steps would accept any loss"
            found = torch.rand(4)
            torch.manual_seed(step)
            seen.append(([one.refused for one in made], torch.equal(found, torch.rand(4))))
            updates.append(updates_done(engine))
        reports.append(asdict(engine.train_step(step, *feed(engine, step))))
    state = gather_state(engine)
    return {
        "reports": distributed.gather_objects(reports),
        "values": state and state.parameters,
        "moments": state and dict(state.moments),
        "counted": (engine.deepspeed.global_steps, engine.deepspeed.skipped_steps, engine.deepspeed.global_samples),
        "scaler": engine.loss_scale.state(),
        "between": (seen, updates),
    }


def compared(name: str, precision: str, stage: int) -> dict[str, Any]:
    """A run without and one with such steps. Collective."""
    return {
        "without": trained(*start(name, stage, precision), ()),
        "with": trained(*start(name, stage, precision), BEFORE),
    }


def main(out: str, name: str, precisions: str) -> None:
    torch.set_num_threads(1)
    start_process_group()
    results = {
        f"{precision}-{stage}": compared(name, precision, stage)
        for precision in precisions.split(",")
        for stage in (1, 2)
    }
    if distributed.is_main():
        torch.save(results, out)
    distributed.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
