"""Micro-batches of two images of different sizes, packed or compiled, under an engine on two gloo ranks.

One rank (see `test_packed_engines.py`):
    RANK=0 WORLD_SIZE=2 ... python -m tests.parallel.packed_case OUT.pt ENGINE STAGE:OPTION [STAGE:OPTION ...]
ENGINE is one of ds_configs. OPTION is packed, or compiled (padded, blocks through torch.compile).
The main process writes all results.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from tests.parallel import engine_case as case
from tests.parallel import pipeline_case
from visft_ds.data.samples import Batch, Sample
from visft_ds.parallel import distributed
from visft_ds.parallel.engine import start_process_group
from visft_ds.tasks.spec import LossDenominators

#: (height, width) of the images of a step: every micro-batch has two sizes.
SIZES = ((56, 112), (112, 56), (28, 112), (84, 70))
ORDER = (("detection",), ("segmentation",), case.TASKS, ("captioning",), ("detection",))
MICRO = 2


@contextmanager
def mixed_sizes() -> Iterator[None]:
    """`engine_case` gives the images of a step other sizes than one another, and moves a head off its kink.

    A new segmentation head looks exactly at the cells, where bilinear sampling has a kink: rounding, which is another
    one in a padded map, would decide which of two gradients its offsets get.
    """
    plain, build = case.samples, case.build

    def samples(step: int, order: case.Order = ORDER, sides: case.Sides = ()) -> list[Sample]:
        return [plain(step, order, (size,))[place] for place, size in enumerate(SIZES)]

    def moved(*given: Any, **named: Any) -> Any:
        built = build(*given, **named)
        for name, parameter in built[0].named_parameters():
            if name.endswith("sampling_offsets.bias"):
                parameter.data += 0.3
        return built

    case.samples, case.build = samples, moved
    try:
        yield
    finally:
        case.samples, case.build = plain, build


def fed(engine: Any, step: int) -> tuple[list[Batch], LossDenominators]:
    """This rank's micro-batch of a step."""
    first = distributed.rank() * MICRO
    whole = case.loss_denominators(engine.module, case.global_batch(step, ORDER), case.GLOBAL_BATCH // MICRO)
    return [case.part(step, first, first + MICRO, ORDER)], whole


def one_run(engine_name: str, name: str) -> dict[str, Any]:
    """What STAGE:OPTION asks for, and in a packed run what is predicted for images that lie in one batch."""
    stage, option = name.split(":")
    with mixed_sizes():
        engine = case.start_engine(int(stage), engine_name, "fp32", accumulation=1)
        engine.module.packed = option == "packed"
        if option == "compiled":
            engine.module.backbone.compile_blocks(backend="aot_eager")
        results = case.run_steps(engine, 0, len(ORDER), None, fed)
        if option == "packed":
            outputs = engine.predict(replace(case.global_batch(distributed.rank(), ORDER), targets={}))
            results["predicted"] = distributed.gather_objects(pipeline_case.tensors_of(outputs))
    counters = torch._dynamo.utils.counters
    return {**results, "compiled": (counters["stats"]["unique_graphs"], sum(counters["graph_break"].values()))}


def main(out: str, engine_name: str, names: Sequence[str]) -> None:
    """One rank of all runs."""
    torch.set_num_threads(1)
    start_process_group()
    results = {name: one_run(engine_name, name) for name in names}
    if distributed.is_main():
        torch.save(results, out)
    distributed.close()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
