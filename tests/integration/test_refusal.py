"""A loss or gradient that is no number, on one rank of two: no rank makes an update, whatever the ZeRO stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.integration.ranks import run_ranks
from tests.integration.refusal_case import MODES

SCALE = 65536.0  #: with which fp16 begins
ENGINES = ("zero0", "zero1", "zero2", "zero3", "zero3_offload")


def check(results: dict[str, Any], precision: str) -> None:
    for mode in MODES:
        found = results[f"{precision}-{mode}"]
        assert found["everyone"][0] == found["everyone"][1]  # all ranks know the same
        assert all(found["equal"]) and found["equal"], mode  # bit for bit the run without this step
        assert found["skipped_steps"] == 1
        refused, skipped, faults = found["everyone"][0]
        if mode == "gradient" and precision == "fp16":
            # Any overflow of fp16 looks like this; it lowers the scale and is no reason for an alarm.
            assert (refused, skipped, found["scale"]) == ("", True, SCALE / 2)
            continue
        assert found["refused"] == ["", "", "gradient" if mode == "gradient" else "loss", ""]
        assert found["scale"] in (None, SCALE)
        assert not skipped
        if mode == "fault":
            assert list(faults) == ["1"] and "image_id 7" in faults["1"][0]
        if mode == "loss":
            assert list(faults) == ["1"] and any("captioning/" in text and "nan" in text for text in faults["1"])


def test_nobody_makes_an_update(tmp_path: Path) -> None:
    run_ranks(["-m", "tests.integration.refusal_case", str(tmp_path / "out.json"), "zero2", "fp32"])
    check(json.loads((tmp_path / "out.json").read_text()), "fp32")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_nobody_makes_an_update_in_any_precision(engine: str, tmp_path: Path) -> None:
    precisions = ("fp32", "bf16") if engine == "zero3_offload" else ("fp32", "bf16", "fp16")
    run_ranks(["-m", "tests.integration.refusal_case", str(tmp_path / "out.json"), engine, *precisions])
    for precision in precisions:
        check(json.loads((tmp_path / "out.json").read_text()), precision)
