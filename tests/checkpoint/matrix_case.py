"""One rank of the checkpoint matrix (see `test_matrix.py`): save under one engine, or resume from all.

RANK=0 WORLD_SIZE=2 ... python -m tests.checkpoint.matrix_case save|resume FOLDER ENGINE
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from tests.parallel.engine_case import SAVED_AT, STEPS, resume, run_steps, start_engine

#: (engine, ranks); pipelines of two and four stages, and two pipelines beside each other.
PLACES = (
    *(
        (engine, world)
        for engine in ("zero0", "zero1", "zero2", "zero3", "zero3_offload")
        for world in (1, 2)
    ),
    *(("pipeline2", 2), ("pipeline2", 4), ("pipeline4", 4)),
)
#: Stage and precision of the runs that are saved -> whose checkpoints every engine takes up.
KINDS: dict[str, tuple[int, str, tuple[str, ...]]] = {
    "heads": (1, "fp32", tuple(f"{engine}-{world}" for engine, world in PLACES)),
    "lora": (2, "fp32", ("zero1-2", "zero3_offload-1", "pipeline2-2", "pipeline4-4")),
    "fp16": (1, "fp16", ("zero1-2", "zero3-1", "pipeline2-2")),  # with the state of a loss scaler
}


def main(what: str, folder: Path, engine: str) -> None:
    """Save or resume; FOLDER/<engine>-<world>-<what>.pt holds what every run gave."""
    from visft_ds import distributed
    from visft_ds.parallel.engine import start_process_group

    torch.set_num_threads(1)
    start_process_group()
    here = f"{engine}-{distributed.world_size()}"
    results: dict[str, Any] = {}
    for kind, (stage, precision, sources) in KINDS.items():
        if what == "save":
            results[kind] = run_steps(start_engine(stage, engine, precision), 0, STEPS, folder / kind / here)
            continue
        for source in sources:
            made = start_engine(stage, engine, precision)
            exact = resume(made, folder / kind / source)
            results[f"{kind} {source}"] = {"exact": exact, **run_steps(made, SAVED_AT, STEPS)}
    if distributed.is_main():
        torch.save(results, folder / f"{here}-{what}.pt")
    distributed.close()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
