"""No number of `tests/house.json` rises in silence: it is lowered by what becomes smaller, raised only by hand."""

from __future__ import annotations

import json

import pytest

from tests.house import RECORD, core, measure_reach, measure_size

RECORDED: dict[str, int] = json.loads(RECORD.read_text(encoding="utf-8"))
HOW = "`python -m tests.house --write` records it; a number that rises needs a line in CHANGELOG.md that says why"


def compare(measured: dict[str, int]) -> None:
    worse = {name: f"{RECORDED[name]} -> {value}" for name, value in measured.items() if value > RECORDED[name]}
    assert worse == {}, HOW
    slack = {name: f"{RECORDED[name]} -> {value}" for name, value in measured.items() if value < 0.98 * RECORDED[name]}
    assert slack == {}, f"smaller than recorded, so the next rise would go unseen: {HOW}"


def test_size() -> None:
    compare(measure_size())


def test_reach() -> None:
    compare(measure_reach())


def test_the_record_is_whole_and_can_be_broken() -> None:
    size = measure_size()
    assert {
        *size,
        *(f"{name} to the first loss" for name in ("functions", "lines", "files", "modules")),
    } == RECORDED.keys()
    with pytest.raises(AssertionError, match="rises"):
        compare({name: RECORDED[name] + 1 for name in size})
    inside = core()
    assert {"visft_ds.train", "visft_ds.data.plan"} <= inside and "visft_ds.profiling.cli" not in inside
