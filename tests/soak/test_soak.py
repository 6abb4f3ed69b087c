"""A minute or two of the soak; `python -m tests.soak` makes it as long as one likes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.soak.soak import Plan, soak


@pytest.mark.slow
def test_a_disturbed_run_ends_as_the_undisturbed_one(tmp_path: Path) -> None:
    """This seed begins with one start by hand and two by the supervisor, and the slowest fault to be found."""
    report = soak(tmp_path, Plan(seed=23, gap=15, minutes=0, steps=90))
    assert report.differences == []
    assert [one.kind for one in report.faults] == ["disk full", "SIGINT to launcher", "SIGSTOP to rank"]
    assert (report.starts, report.restarts) == (2, 2)
