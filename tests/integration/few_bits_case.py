"""The tiny model of `engine_case` over a base in few bits, under every engine.

One rank (see `test_few_bits.py`):
    RANK=0 WORLD_SIZE=2 ... python -m tests.integration.few_bits_case OUT.pt
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from tests.integration import engine_case as case
from tests.integration import pipeline_case
from visft_ds.model import MultiTaskModel
from visft_ds.models.low_bit import compare_with_full, frozen_matrices, store_in_few_bits
from visft_ds.prepare.model import TrainedGroup

#: (stage, precision, storage of the base); nf4 needs rows of 64 values, the tiny model has 32.
RUNS = ((2, "fp32", "int8"), (2, "bf16", "fp8"), (1, "fp32", "fp8"))
ENGINES = ("zero0", "zero1", "zero2", "zero3", "zero3_offload", "pipeline")
_build = case.build


def use_base(storage: str) -> None:
    """From now on every tiny model of this process has its base stored so."""

    def build(stage: int, *, storage_of_matrices: torch.dtype) -> tuple[MultiTaskModel, tuple[TrainedGroup, ...]]:
        module, groups = _build(stage, storage=storage_of_matrices)
        store_in_few_bits(module.backbone, storage)
        return module, groups

    case.build = lambda stage, storage=torch.float32: build(stage, storage_of_matrices=storage)


def frozen_bytes(module: MultiTaskModel) -> dict[str, bytes]:
    """Codes of every matrix that is whole in this process."""
    layers = frozen_matrices(module.backbone)
    return {
        name: bytes(layer.weight.flatten().tolist())
        for name, layer in layers.items()
        if not layer.weight.is_meta and layer.weight.numel()
    }


def main(out: str) -> None:
    """One rank: a few steps of every run under every engine."""
    from visft_ds.parallel import distributed
    from visft_ds.parallel import engine as engine_module
    from visft_ds.parallel.placement import Shards

    torch.set_num_threads(1)
    engine_module.start_process_group()
    results: dict[str, Any] = {}
    for stage, precision, base in RUNS:
        use_base(base)
        for name in ENGINES[:-1]:
            engine = case.start_engine(stage, name, precision)
            results[f"{name} {stage} {precision} {base}"] = case.run_steps(engine, 0, case.STEPS, None)
            if name == "zero0":
                results[f"codes {stage} {precision} {base}"] = frozen_bytes(engine.module)
    # Where parameters are divided, a tower is compared with the full one while they are gathered.
    use_base("int8")
    module, _ = case.build(2)
    full = dict(_build(2)[0].backbone.named_parameters())
    shards = Shards(case.engine_config("zero3", "fp32"))
    for parameter in module.backbone.parameters():
        shards.place(parameter)
    compared = compare_with_full(module.backbone, lambda name: full[name].detach().clone(), shards.whole)
    results["compared"] = distributed.gather_objects(compared)
    # Behind a pipeline DeepSpeed builds no other engine in the same process.
    for stage, precision, base in RUNS:
        use_base(base)
        engine = pipeline_case.build_engine(stage, precision, 2)
        results[f"pipeline {stage} {precision} {base}"] = pipeline_case.run(engine, case.ORDER, pipeline_case.SQUARE)
    if distributed.is_main():
        torch.save(results, out)
    distributed.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
