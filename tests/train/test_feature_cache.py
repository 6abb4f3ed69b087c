"""Training on kept features: the same run whether the backbone runs or not, and features that another run finds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.ranks import run_ranks
from tests.tiny import command, trained


@pytest.mark.slow
def test_kept_features_change_no_result(shards: Path, tmp_path: Path) -> None:
    """Against the same run without a folder; of other sizes in a batch, in bf16 storage, for all heads together."""
    shared = {
        "visft.mode": "shared",
        "visft.shared.image": {"short_sides": [42, 56], "max_long": 56},
        "visft.shared.micro_batch": 4,
        "visft.features.views": 1,
    }
    kept, folder = {"visft.features.cache": str(tmp_path / "features")}, tmp_path / "features"
    counts = []
    for name, extra in {"apart": {}, "filled": kept, "full": {**kept, "visft.seed": 5}}.items():
        run_ranks(["launchers/train.py", *command(shards, tmp_path / name, extra={**shared, **extra})], 1)
        counts.append(sum(path.is_file() for path in folder.rglob("*")))
    assert counts[0] == 0 < counts[1] == counts[2], "another seed and other heads find the same features"
    apart, filled = trained(tmp_path / "apart"), trained(tmp_path / "filled")
    assert apart.keys() == filled.keys()
    assert all(torch.equal(apart[name], value) for name, value in filled.items())
