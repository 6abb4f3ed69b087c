"""ZeRO-3 has no more of a frozen backbone whole than its engine file allows, whatever DeepSpeed knows of a step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.parallel.gathered_case import BLOCK, DEFAULTS, LIMITS, SCALE
from tests.ranks import run_ranks
from visft_ds.config import resolve


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_gathering_ahead_needs_its_limits(stage: int, tmp_path: Path) -> None:
    """With DeepSpeed's own it is far more than its prefetch bucket, which each module fills anew."""
    run_ranks(["-m", "tests.parallel.gathered_case", str(tmp_path / "out.json"), str(stage)])
    found = json.loads((tmp_path / "out.json").read_text())
    ours, defaults = found["ours"], found["defaults"]
    print(found)
    assert max(ours["most"]) < 2 * BLOCK
    assert max(defaults["most"]) > 10 * BLOCK > 10 * DEFAULTS["stage3_prefetch_bucket_size"] / SCALE
    for one in (ours, defaults):
        assert one["predicted"] == pytest.approx(max(one["most"]), abs=BLOCK / 3)  # the largest tensor


@pytest.mark.parametrize("engine", ["zero3", "zero3_offload"])
def test_engine_files_limit_what_is_gathered(engine: str) -> None:
    zero = resolve(stage=2, model="eva_e", engine=engine).deepspeed["zero_optimization"]
    assert all(zero[name] * 5 <= limit or name.endswith("bucket_size") for name, limit in DEFAULTS.items())
    assert set(LIMITS) <= zero.keys()
