"""The debug model's losses are those on record: a refactor may not move them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.golden.losses import STEPS, golden, train_stages

#: On one machine the numbers are equal to the last digit. Other processors sum in another order (1e-7), which
#: six steps of training and the discrete matching magnify.
TOLERANCE = 1e-3


def test_losses_are_the_golden_ones(tmp_path: Path) -> None:
    losses = train_stages(tmp_path)
    for stage in ("stage1", "stage2"):
        expected = json.loads(golden(stage).read_text(encoding="utf-8"))
        assert len(losses[stage]) == len(expected) == STEPS
        for step, (found, wanted) in enumerate(zip(losses[stage], expected, strict=True)):
            assert found == pytest.approx(wanted, rel=TOLERANCE, abs=1e-6), f"step {step + 1} of {stage}"
