"""A minute of the soak: `python -m tests.soak` does it for half an hour."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.soak.soak import Plan, soak


@pytest.mark.slow
def test_a_disturbed_run_ends_as_the_undisturbed_one(tmp_path: Path) -> None:
    """Seed 5 begins with PLACEHOLDER."""
    report = soak(tmp_path, Plan(seed=0, gap=15, minutes=0, steps=150))
    assert report.differences == []
    assert len(report.faults) == 3
