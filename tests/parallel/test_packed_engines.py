"""Packed micro-batches on two ranks equal one process that takes the images one by one.

One rank:
    RANK=0 WORLD_SIZE=2 ... python -m tests.parallel.test_packed_engines OUT.pt ENGINE STAGE:OPTION
    [STAGE:OPTION ...]
ENGINE is one of ds_configs. OPTION is packed, or timm (a tower of timm).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from tests.parallel import engine_case as case
from tests.parallel.pipeline_case import tensors_of
from tests.parallel.test_engines import check_equal
from visft_ds import distributed
from visft_ds.data.samples import Batch
from visft_ds.models.timm_backbone import build_timm

pytestmark = pytest.mark.slow
#: (height, width) of the images of a step: a micro-batch has two sizes, or one, where that of the other rank
#: has two.
SIZES = (((56, 112), (112, 56), (28, 112), (84, 70)), ((56, 112), (56, 112), (28, 112), (84, 70)))
ORDER = (("detection",), ("segmentation",), case.TASKS, ("captioning",), ("detection",))
RUNS = (
    ("zero1", "1:packed", "2:packed", "1:timm"),
    ("zero3", "1:packed", "2:packed", "1:timm"),
)


def build(*given: Any, **named: Any) -> Any:
    """`engine_case.build`, with a head off its kink.

    A new segmentation head looks exactly at the cells, where bilinear sampling has a kink: rounding, which is
    another one in a padded map, would decide which of two gradients its offsets get.
    """
    built = case.build(*given, **named)
    for name, parameter in built[0].named_parameters():
        if name.endswith("sampling_offsets.bias"):
            parameter.data += 0.3
    return built


def build_timm_case(stage: int, **named: Any) -> Any:
    """`build` on a tower of timm, whose ranks must call it equally often under ZeRO-3: they draw other
    sizes.
    """
    tower = build_timm("test_vit3").requires_grad_(False)
    build_tasks = case.build_tasks
    with (
        patch.object(case, "build_backbone", lambda *_, **__: tower),
        patch.object(case, "build_tasks", lambda _: build_tasks(tower.width)),
    ):
        return build(stage, **named)


def one_run(engine_name: str, name: str) -> dict[str, Any]:
    """What STAGE:OPTION asks for, and what is predicted for images that lie in one batch."""
    stage, option = name.split(":")
    made = build_timm_case if option == "timm" else build
    engine = case.start_engine(int(stage), engine_name, "fp32", micro=2, build=made)
    results = case.run_steps(engine, 0, len(ORDER), feed=partial(case.fed, order=ORDER, sides=SIZES))
    outputs = engine.predict(replace(unlike(distributed.rank()), targets={}))
    return {**results, "predicted": distributed.gather_objects(tensors_of(outputs))}


def unlike(rank: int) -> Batch:
    """Images of other sizes on each rank, and one fewer on the second, as where images are cut into
    windows.
    """
    batch = case.global_batch(rank, ORDER, SIZES)
    return replace(batch.of_images(torch.arange(case.GLOBAL_BATCH - rank)), targets=batch.targets)


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run[0])
def test_two_ranks_equal_one_process(run: tuple[str, ...], tmp_path: Path) -> None:
    trained = case.results_of("test_packed_engines", tmp_path / "results.pt", *run)
    for name in run[1:]:
        found, stage, option = trained[name], int(name[0]), name[2:]
        made = build_timm_case if option == "timm" else build
        parts = case.GLOBAL_BATCH
        check_equal(found, case.train_plain(stage, "fp32", ORDER, SIZES, parts, made), name)
        module, _ = made(stage)
        module.load_state_dict({**module.state_dict(), **found["values"]})
        module.eval()
        for rank, predicted in enumerate(found["predicted"]):
            with torch.no_grad():
                expected = tensors_of(module(unlike(rank)))
            # Of the tasks that have labels; under ZeRO-3 there may be more images at the end.
            seen = {key: predicted[key][tuple(map(slice, value.shape))] for key, value in expected.items()}
            torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-4)


if __name__ == "__main__":
    case.write_results(lambda out, engine, *names: {name: one_run(engine, name) for name in names})
