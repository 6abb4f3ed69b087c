"""Packed micro-batches on two ranks equal one process that takes the images one by one; compiled ones eager ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parallel import engine_case as case
from tests.parallel.packed_case import ORDER, SIZES, build
from tests.parallel.pipeline_case import tensors_of
from tests.parallel.test_engines import check_equal
from tests.parallel.test_pipeline import runs
from tests.ranks import run_ranks

pytestmark = pytest.mark.slow


def plain(stage: int, *, parts: int) -> dict[str, Any]:
    return case.train_plain(stage, "fp32", ORDER, SIZES, parts, build)


@pytest.fixture(
    scope="module",
    params=[("zero1", ["1:packed", "2:packed", "2:compiled"]), ("zero3", ["1:packed", "2:packed"])],
    ids=["zero1", "zero3"],
)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    engine, names = request.param
    out: Path = tmp_path_factory.mktemp(engine) / "results.pt"
    run_ranks(["-m", "tests.parallel.packed_case", str(out), engine, *names])
    results: dict[str, dict[str, Any]] = torch.load(out, weights_only=False)
    return results


def test_two_ranks_equal_one_process(trained: dict[str, dict[str, Any]]) -> None:
    for name, run in trained.items():
        stage, option = name.split(":")
        packed = option == "packed"
        # Padding is a matter of who lies in one micro-batch, so compiled runs are compared with the same micro-batches.
        check_equal(run, plain(int(stage), parts=case.GLOBAL_BATCH if packed else 2), name)


def test_predictions_of_packed_images_are_those_of_each_alone(trained: dict[str, dict[str, Any]]) -> None:
    for name, run in runs(trained, "packed").items():
        module, _ = build(int(name[0]))
        for parameter, value in run["values"].items():
            module.get_parameter(parameter).data.copy_(value)
        module.packed = True
        module.eval()
        with torch.no_grad():
            for rank, found in enumerate(run["predicted"]):
                expected = tensors_of(module(case.global_batch(rank, ORDER, SIZES)))
                for output, value in expected.items():
                    torch.testing.assert_close(found[output], value, rtol=1e-4, atol=1e-4, msg=f"{name} {output}")


def test_compiled_blocks_are_whole_and_few(trained: dict[str, dict[str, Any]]) -> None:
    """Five steps of two shapes a rank: an input with a gradient and one without, forward only once each."""
    for run in runs(trained, "compiled").values():
        graphs, breaks = run["compilations"]
        assert graphs <= 4 and breaks == 0
