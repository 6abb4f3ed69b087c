"""A base in few bits under every engine on two gloo ranks equals one plain process over the same base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integration import engine_case as case
from tests.integration import few_bits_case
from tests.integration.ranks import run_ranks
from tests.integration.test_engines import BF16_LOSS, BF16_NORM, BF16_WEIGHTS, LOSS, NORM, WEIGHTS, differences
from visft_ds.models.low_bit import compare_with_full, frozen_matrices, store_in_few_bits
from visft_ds.prepare.materialize import HOST

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out: Path = tmp_path_factory.mktemp("few_bits") / "results.pt"
    run_ranks(["-m", "tests.integration.few_bits_case", str(out)])
    found: dict[str, Any] = torch.load(out, weights_only=False)
    return found


@pytest.mark.parametrize("run", few_bits_case.RUNS, ids=lambda run: "-".join(map(str, run)))
def test_every_engine_equals_one_process(
    trained: dict[str, Any], run: tuple[int, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, precision, base = run
    monkeypatch.setattr(case, "build", case.build)  # put back at the end
    few_bits_case.use_base(base)
    plain = case.train_plain(stage, precision)
    bounds = (BF16_LOSS, BF16_NORM, BF16_WEIGHTS) if precision == "bf16" else (LOSS, NORM, WEIGHTS)
    for name in few_bits_case.ENGINES:
        found = differences(trained[f"{name} {stage} {precision} {base}"], plain)
        assert tuple(found.values()) <= bounds, (name, found)
        assert all(value <= bound for value, bound in zip(found.values(), bounds, strict=True)), (name, found)
    module, _ = case.build(stage, storage=case.STORAGE[precision])
    assert trained[f"codes {stage} {precision} {base}"] == few_bits_case.frozen_bytes(module)


def test_divided_parameters_are_compared_like_whole_ones(trained: dict[str, Any]) -> None:
    module, _ = case.build(2)
    full = {name: one.weight.detach().clone() for name, one in frozen_matrices(module.backbone).items()}
    store_in_few_bits(module.backbone, "int8")
    here = compare_with_full(module.backbone, lambda name: full[name.removesuffix(".weight")], HOST.whole)
    assert here is not None and trained["compared"] == [here, here]
