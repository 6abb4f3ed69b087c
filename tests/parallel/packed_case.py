"""Micro-batches of two images of different sizes, packed or compiled, under an engine on two gloo ranks.

One rank (see `test_packed_engines.py`):
    RANK=0 WORLD_SIZE=2 ... python -m tests.parallel.packed_case OUT.pt ENGINE STAGE:OPTION [STAGE:OPTION ...]
ENGINE is one of ds_configs. OPTION is packed, or compiled (padded, blocks through torch.compile).
The main process writes all results.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from tests.parallel import engine_case as case
from tests.parallel import pipeline_case
from visft_ds.parallel import distributed
from visft_ds.parallel.engine import start_process_group

#: (height, width) of the images of a step: every micro-batch has two sizes.
SIZES = (((56, 112), (112, 56), (28, 112), (84, 70)),)
ORDER = (("detection",), ("segmentation",), case.TASKS, ("captioning",), ("detection",))


def compilations() -> tuple[int, int]:
    """Graphs that this process has compiled so far, and places where a graph had to be broken up."""
    counters = torch._dynamo.utils.counters
    return int(counters["stats"]["unique_graphs"]), sum(counters["graph_break"].values())


def build(*given: Any, **named: Any) -> Any:
    """`engine_case.build`, with a head off its kink.

    A new segmentation head looks exactly at the cells, where bilinear sampling has a kink: rounding, which is another
    one in a padded map, would decide which of two gradients its offsets get.
    """
    built = case.build(*given, **named)
    for name, parameter in built[0].named_parameters():
        if name.endswith("sampling_offsets.bias"):
            parameter.data += 0.3
    return built


def one_run(engine_name: str, name: str) -> dict[str, Any]:
    """What STAGE:OPTION asks for, and in a packed run what is predicted for images that lie in one batch."""
    stage, option = name.split(":")
    engine = case.start_engine(int(stage), engine_name, "fp32", accumulation=1, build=build)
    engine.module.packed = option == "packed"
    if option == "compiled":
        engine.module.backbone.compile_blocks(backend="aot_eager")
    feed = partial(case.fed, order=ORDER, sides=SIZES)
    results = {**case.run_steps(engine, 0, len(ORDER), None, feed), "compilations": compilations()}
    if option == "packed":
        outputs = engine.predict(replace(case.global_batch(distributed.rank(), ORDER, SIZES), targets={}))
        results["predicted"] = distributed.gather_objects(pipeline_case.tensors_of(outputs))
    return results


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
