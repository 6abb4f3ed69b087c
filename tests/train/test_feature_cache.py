"""Training on kept features: the same run whether the backbone runs or not, and no pixels once all are kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.ranks import run_ranks
from tests.tiny import command, trained


def decoded(out: Path) -> list[int]:
    """In which steps time went into pictures."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    seconds = [0.0, *(record["data_seconds/decode"] for record in records if record["kind"] == "step")]
    return [step for step in range(1, len(seconds)) if seconds[step] > seconds[step - 1]]


@pytest.mark.slow
def test_kept_features_change_no_result(shards: Path, tmp_path: Path) -> None:
    """Against the same run without a folder; of other sizes in a batch, in bf16 storage, for all heads at once."""
    shared = {
        "visft.mode": "shared",
        "visft.shared.image": {"short_sides": [42, 56], "max_long": 56},
        "visft.shared.micro_batch": 4,
        "visft.data.prefetch_steps": 0,
        "visft.features.views": 1,
    }
    printed = {}
    for name, extra in {
        "apart": {},
        "filled": {"visft.features.cache": str(tmp_path / "features")},
        "full": {"visft.features.cache": str(tmp_path / "features"), "visft.seed": 5},
    }.items():
        (printed[name],) = run_ranks(
            ["launchers/train.py", *command(shards, tmp_path / name, extra={**shared, **extra})], 1
        )
    apart, filled = trained(tmp_path / "apart"), trained(tmp_path / "filled")
    assert apart.keys() == filled.keys()
    assert all(torch.equal(apart[name], value) for name, value in filled.items())
    assert decoded(tmp_path / "apart") == list(range(1, 9))
    assert decoded(tmp_path / "filled") == [1, 2, 3]  # the first epoch
    assert decoded(tmp_path / "full") == []  # another seed, other heads: the same features
    assert "0 of 12 are in" in printed["filled"] and "12 of 12 are in" in printed["full"]
    assert "not kept" in printed["apart"]
