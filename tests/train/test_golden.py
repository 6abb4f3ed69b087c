"""The debug model's losses are those on record: a refactor may not move them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.golden.losses import STEPS, golden, train_stages

#: On one machine the numbers are equal to the last digit. Other processors sum in another order (1e-7), which six steps
#: of training and the discrete matching magnify.
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, float]]]:
    """Losses of this version."""
    return train_stages(Path(tmp_path_factory.mktemp("golden")))


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_losses_are_the_golden_ones(losses: dict[str, list[dict[str, float]]], stage: str) -> None:
    expected = json.loads(golden(stage).read_text(encoding="utf-8"))
    assert len(losses[stage]) == len(expected) == STEPS
    for step, (found, wanted) in enumerate(zip(losses[stage], expected, strict=True)):
        assert found == pytest.approx(wanted, rel=TOLERANCE, abs=1e-6), f"step {step + 1} of {stage}"
