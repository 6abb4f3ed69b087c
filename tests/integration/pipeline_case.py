"""The tiny model of `engine_case` under the pipeline engine, stage by stage.

One rank of a pipeline (see `test_pipeline.py`):
    RANK=0 WORLD_SIZE=2 ... python -m tests.integration.pipeline_case OUT.pt STAGES RUN [RUN ...]
RUN is stage:precision:order, e.g. 1:fp32:mixed; results of all runs are written by the main process.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from tests.integration import engine_case as case
from visft_ds.config.layers import CONFIG_ROOT
from visft_ds.data.samples import Batch
from visft_ds.multitask import Normaliser

ORDERS: Mapping[str, case.Order] = {
    "mixed": case.ORDER,
    "shared": (case.TASKS,) * 3,
    **{task: ((task,),) * 3 for task in case.TASKS},
}
#: Images change their shape from step to step.
SIDES = ((56, 56), (28, 84), (84, 56))
#: The layers are embedding, two blocks and heads.
BOUNDS = {2: (0, 2, 4), 4: (0, 1, 2, 3, 4)}


def build_engine(stage: int, precision: str, stages: int) -> Any:
    """The pipeline engine over the model that `train_plain` trains."""
    from visft_ds.parallel import distributed
    from visft_ds.parallel.pipeline import PipelineEngine

    config = json.loads((CONFIG_ROOT / "engines/pipeline.json").read_text())
    accumulation = case.GLOBAL_BATCH // (distributed.world_size() // stages)
    config |= {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": case.CLIP,
        "steps_per_print": 10**9,
        "pipeline": {"stages": stages},
    }
    if precision != "fp32":
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    module, groups = case.build(stage, storage=torch.bfloat16 if precision == "bf16" else torch.float32)
    optimizer_groups = [
        {"params": list(g.parameters), "lr": g.lr, "weight_decay": g.weight_decay, "name": g.name} for g in groups
    ]
    return PipelineEngine(
        module,
        optimizer_groups,
        config,
        bounds=BOUNDS[stages],
        build_optimizer=torch.optim.AdamW,
        schedule=case.factor,
        seed=0,
    )


def fed(engine: Any, step: int, order: case.Order) -> tuple[list[Batch], Normaliser]:
    """What this rank has read of a step: pixels only, labels only, or nothing."""
    place, role = engine.place, engine.place.role
    whole = case.global_batch(step, order, SIDES)
    if role is None:
        return [], {}
    batches = []
    for index in range(engine.accumulation):
        first = index * place.dp_size + place.dp_rank
        batch = case.part(step, first, first + 1, order, SIDES)
        empty = torch.zeros((1, 3, 0, 0), dtype=torch.uint8)
        batches.append(replace(batch, targets={}) if role == "images" else replace(batch, images=empty))
    return batches, case.normaliser(engine.module, whole, case.GLOBAL_BATCH) if role == "labels" else {}


def run(engine: Any, order: case.Order, start: int = 0) -> dict[str, Any]:
    """Train; what `train_plain` returns, on the main process."""
    from visft_ds.parallel.engine_state import gather_parameters

    losses, norms = [], []
    for step in range(start, len(order)):
        batches, normaliser = fed(engine, step, order)
        report = engine.train_step(step, batches, normaliser)
        losses.append(report.losses["loss"])
        norms.append(report.gradient_norm)
    return {"losses": losses, "norms": norms, "values": gather_parameters(engine)}


def main(out: str, stages: int, names: Sequence[str]) -> None:
    """One rank of all runs."""
    from visft_ds.parallel import distributed
    from visft_ds.parallel.engine import start_process_group

    torch.set_num_threads(1)
    start_process_group()
    results = {}
    for name in names:
        stage, precision, order = name.split(":")
        results[name] = run(build_engine(int(stage), precision, stages), ORDERS[order])
    if distributed.is_main():
        torch.save(results, out)
    distributed.close()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
