"""Models of timm under every ZeRO engine on two gloo ranks equal one plain PyTorch process on the global batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parallel import engine_case as case
from tests.parallel import timm_case
from tests.parallel.test_engines import BF16_LOSS, BF16_NORM, BF16_WEIGHTS, LOSS, NORM, WEIGHTS, differences
from tests.ranks import finish, start_ranks

pytest.importorskip("timm")
pytestmark = pytest.mark.slow
#: Under ZeRO-3 gradients of tensors in bf16, such as that a stage of ConvNeXt begins with, differ by a unit of bf16;
#: the forward pass does not. Measured, on two processors: 1.8e-4, 1.4e-2, 5.2e-4.
ZERO3_BF16 = (1e-3, 2e-2, BF16_WEIGHTS)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out: Path = tmp_path_factory.mktemp("timm") / "results.pt"
    codes, outputs = finish(start_ranks(["-m", "tests.parallel.timm_case", str(out)]), timeout=900)
    assert codes == [0, 0], "\n".join(outputs)
    found: dict[str, Any] = torch.load(out)
    return found


@pytest.mark.parametrize("name", timm_case.RUNS)
def test_every_engine_equals_one_process(trained: dict[str, Any], name: str) -> None:
    run = timm_case.RUNS[name]
    plain = timm_case.train_plain(run)
    assert min(plain["norms"]) > case.CLIP
    bounds = {"fp32": (LOSS, NORM, WEIGHTS), "bf16": (BF16_LOSS, BF16_NORM, BF16_WEIGHTS)}[run.precision]
    for engine in timm_case.ENGINES:
        found = differences(trained[f"{engine} {name}"], plain)
        wide = run.precision == "bf16" and engine.startswith("zero3")
        allowed = ZERO3_BF16 if wide else bounds
        assert all(value <= bound for value, bound in zip(found.values(), allowed, strict=True)), (engine, found)
