"""MFU of a step: the formula against the peak that a GPU's maker states."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from visft_ds.costs.flops import Flops
from visft_ds.run import operations
from visft_ds.run.operations import StepFormula, seconds_at_peak


@pytest.mark.parametrize(
    ("device", "name", "stages", "total", "seconds"),
    [
        ("cuda", "NVIDIA H100 80GB HBM3", 1, Flops(100, 200, 50), 300 / 989.4e12),  # what is recomputed does not count
        ("cuda", "NVIDIA H100 80GB HBM3", 1, None, None),
        ("cuda", "NVIDIA H100 80GB HBM3", 2, Flops(1, 1, 1), "none"),
        ("cuda", "Some GPU", 1, Flops(1, 1, 1), "none"),
        ("cpu", "", 1, Flops(1, 1, 1), "none"),
    ],
)
def test_seconds_at_the_peak(
    device: str, name: str, stages: int, total: Flops | None, seconds: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(operations, "formula_of", lambda *_: StepFormula(total, total and Flops()))
    engine: Any = SimpleNamespace(device=torch.device(device))
    config: Any = SimpleNamespace(pipeline_stages=stages)
    found = seconds_at_peak(engine, config, "bf16")
    if seconds == "none":
        assert found is None
    else:
        assert found is not None and found([]) == pytest.approx(seconds)
