"""One rank of a run with steps in between that may not change anything: it has to be the run without them.

RANK=0 WORLD_SIZE=2 ... python -m tests.integration.unchanged_case OUT.pt ENGINE PRECISION,...
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from tests.integration.engine_case import STEPS, Feed
from tests.integration.matrix_case import start
from visft_ds.parallel import distributed
from visft_ds.parallel.engine import grad_scaler, start_process_group
from visft_ds.parallel.engine_state import gather_parameters, gather_state, updates_done
from visft_ds.parallel.unchanged import unchanged

#: Before these steps all others are made without a trace; at 0 there are no moments yet.
BEFORE = (0, 4)


def trained(engine: Any, feed: Feed, before: tuple[int, ...]) -> dict[str, Any]:
    """Train; what the main process knows of every step and of the end."""
    reports, states, updates = [], [], []
    for step in range(STEPS):
        if step in before:
            torch.manual_seed(step)
            with unchanged(engine):
                states.append(list(engine.train_step(n, *feed(engine, n)).refused for n in range(STEPS)))
            updates.append(updates_done(engine))
            states.append(torch.equal(torch.rand(4), torch.manual_seed(step) and torch.rand(4)))
        reports.append(engine.train_step(step, *feed(engine, step)))
    scaler = grad_scaler(engine.deepspeed)
    return {
        "reports": distributed.gather_objects(reports),
        "state": gather_state(engine),
        "parameters": gather_parameters(engine),
        "counted": (engine.deepspeed.global_steps, engine.deepspeed.skipped_steps, updates),
        "scaler": scaler and scaler.state_dict(),
        "seen": states,
    }


def compared(name: str, precision: str, stage: int) -> dict[str, Any]:
    """A run without and one with such steps. Collective."""
    return {str(len(before)): trained(*start(name, stage, precision), before) for before in ((), BEFORE)}


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
