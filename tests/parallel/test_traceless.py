"""Steps that leave no trace: a loss or gradient that is no number, on one rank of two, and those of the rehearsal.

Representative cases run with `test_engines.py` and `test_pipeline.py`, in processes that are there anyway.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parallel.engine_case import SCALE
from tests.parallel.traceless_case import MODES
from tests.ranks import run_ranks

ENGINES = ("zero0", "zero1", "zero2", "zero3", "zero3_offload", "pipeline2")


def check(found: dict[str, Any], precision: str, mode: str) -> None:
    assert found["everyone"][0] == found["everyone"][1]  # all ranks know the same
    assert all(found["equal"]) and found["equal"], (precision, mode)  # bit for bit the run without this step
    scale = SCALE if precision == "fp16" else None
    if mode == "rehearsal":
        # Losses, norms and rates too.
        assert found["reports_equal"] and found["skipped_steps"] == 0 and found["scales"] == [scale] * 2
        return
    assert found["skipped_steps"] == 1
    refused, skipped, faults = found["everyone"][0]
    if mode == "gradient" and precision == "fp16":
        # Any overflow of fp16 looks like this; it lowers the scale and is no reason for an alarm.
        assert (refused, skipped, found["scales"]) == ("", True, [SCALE / 2] * 2)
        return
    assert found["refused"] == ["", "", "gradient" if mode == "gradient" else "loss", ""]
    assert found["scales"] == [scale] * 2
    assert not skipped
    if mode == "fault":
        assert list(faults) == [1] and "image_id 7" in faults[1][0]
    if mode == "leap":
        assert not faults
    if mode == "loss":
        assert list(faults) == [1] and any("captioning/" in text and "nan" in text for text in faults[1])


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_no_trace_in_any_precision(engine: str, tmp_path: Path) -> None:
    precisions = ("fp32", "bf16") if engine == "zero3_offload" else ("fp32", "bf16", "fp16")
    out = tmp_path / "out.pt"
    run_ranks(["-m", "tests.parallel.traceless_case", str(out), engine, ",".join(precisions)])
    results = torch.load(out)
    for precision in precisions:
        for mode in MODES:
            check(results[f"{precision}-{mode}"], precision, mode)
