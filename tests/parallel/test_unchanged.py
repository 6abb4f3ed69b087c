"""Steps without a trace, before the first one and in the middle: what is learnt is the same to the last bit.

A representative case runs with `test_engines.py`, in processes that are there anyway.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parallel.unchanged_case import BEFORE, MADE
from tests.ranks import run_ranks

ENGINES = ("zero0", "zero1", "zero2", "zero3", "zero3_offload", "pipeline2")


def check(found: dict[str, Any]) -> None:
    ours, reference = found["with"], found["without"]
    assert ours["reports"] == reference["reports"]  # losses, norms, rates of every step on every rank
    assert ours["counted"] == reference["counted"] and ours["scaler"] == reference["scaler"]
    pairs = [(ours["values"], reference["values"])]
    pairs += [(ours["moments"][key], held) for key, held in reference["moments"].items()]
    for one, other in pairs:
        assert one.keys() == other.keys() and one
        assert all(torch.equal(one[name], value) for name, value in other.items())
    between, updates = ours["between"]
    # Each of them went as far as the update, and random numbers go on as if it had not been.
    assert between == [(["loss"] * len(MADE), True)] * len(BEFORE)
    assert updates == list(BEFORE)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_is_learnt_in_any_precision(engine: str, tmp_path: Path) -> None:
    precisions = ("fp32", "bf16") if engine in ("zero3_offload", "pipeline2") else ("fp32", "bf16", "fp16")
    out = tmp_path / "out.pt"
    run_ranks(["-m", "tests.parallel.unchanged_case", str(out), engine, ",".join(precisions)])
    results = torch.load(out)
    assert len(results) == 2 * len(precisions)
    for found in results.values():
        check(found)
