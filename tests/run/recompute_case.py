"""Runs whose policy of recomputing is chosen, and two ranks that choose one together.

One rank: RANK=0 WORLD_SIZE=2 ... python -m tests.run.recompute_case OUT, which writes OUT.RANK
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from visft_ds.config import ResolvedConfig, changed, resolve
from visft_ds.planner.memory import plan_largest, planned_run


def configured() -> ResolvedConfig:
    """Detection alone, with the policy left to the start; activations are most of what a step holds."""
    settings = [
        *(
            "visft.mode=sampled",
            "visft.tasks=detection",
            "visft.model.activation_checkpointing=auto",
            "visft.data.prefetch_steps=0",
        ),
        *("visft.tasks.detection.micro_batch=4", "visft.tasks.detection.batch_size=4"),
        "zero_optimization.reduce_bucket_size=100000",
        'visft.model.overrides={"width": 64, "depth": 6, "num_heads": 4}',
    ]
    return resolve(stage=2, model="debug", settings=settings)


def needs(policy: str) -> int:
    """Bytes of the largest step on one process."""
    config = changed(configured(), [f"visft.model.activation_checkpointing={policy}"])
    return plan_largest(planned_run(config, 1, "fp32", None, torch.device("cpu"))).total


def main(out: str) -> None:
    from visft_ds import distributed
    from visft_ds.parallel.engine import start_process_group
    from visft_ds.run import machine
    from visft_ds.run.folder import EarlierStarts

    start_process_group()
    rank = distributed.rank()
    room = {0: needs("none"), 1: needs("block")}[rank]
    machine.memory_of = lambda device: room
    config = configured()
    chosen, there = machine.settle_checkpointing(
        config, machine.check_machine(config, 1), None, EarlierStarts()
    )
    Path(f"{out}.{rank}").write_text(
        json.dumps([chosen.visft.model.activation_checkpointing, there.why_checkpointing]), encoding="utf-8"
    )
    distributed.close()


if __name__ == "__main__":
    main(sys.argv[1])
