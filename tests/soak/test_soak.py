"""The soak, for a minute or two (`python -m tests.soak` takes as long as you like), and what it sees."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.checkpoint.faulty_disk import state
from tests.soak.compare import differences
from tests.soak.schedule import HARM, REQUESTS, schedule
from tests.soak.soak import soak
from tests.tiny import records
from visft_ds.checkpoint.format import save_checkpoint
from visft_ds.parallel.state import EngineState
from visft_ds.run_files import EXPORT_RECORD_FILE


@pytest.mark.slow
def test_a_disturbed_run_ends_as_the_undisturbed_one(tmp_path: Path) -> None:
    report = soak(tmp_path, seed=51, gap=15, steps=90)
    assert report.differences == []
    assert [fault.kind for fault in report.faults] == [
        "disk full",
        "SIGTERM to rank",
        "SIGKILL, and again while it starts",
    ]
    assert (report.starts, report.restarts) == (3, 2)


def test_the_seed_alone_decides_and_every_fault_comes() -> None:
    short, long = schedule(3, gap=40, last=500), schedule(3, gap=40, last=4000)
    assert long[: len(short)] == short != schedule(4, gap=40, last=500)
    assert {fault.kind.name for fault in long} == {kind.name for kind in (*HARM, *REQUESTS)}


def leave(out: Path) -> None:
    """What a run of four steps leaves."""
    for step in (2, 4):
        save(out, step, state(step))
    (out / "export" / "adapter").mkdir(parents=True)
    (out / "export" / "adapter" / "adapter_config.json").write_text("{}")
    (out / "export" / EXPORT_RECORD_FILE).write_text(str(out))  # the record of the run: times and places
    records = [{"kind": "step", "step": n, "loss/loss": 1 / n, "time": n} for n in range(1, 5)]
    write(out, [*records, {"kind": "step", "step": 4, "val/box/AP": 0.5, "time": 1}])


def write(out: Path, records: list[dict[str, object]]) -> None:
    (out / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def save(out: Path, step: int, what: EngineState) -> None:
    save_checkpoint(out / "checkpoints", step, what, {})


CHANGES: dict[str, Callable[[Path], None]] = {
    "9 updates, expected 4": lambda out: save(out, 4, replace(state(4), updates=9)),
    "checkpoints of steps [2, 3, 4]": lambda out: save(out, 3, state(3)),
    "adapter_config.json: other bytes": lambda out: os.truncate(
        out / "export/adapter/adapter_config.json", 1
    ),
    "more than once [2]": lambda out: write(out, [*records(out), records(out)[1]]),
    "the first is 1": lambda out: write(
        out, [{**record, "loss/loss": 2.0} if record["step"] == 1 else record for record in records(out)]
    ),
    "evaluations of []": lambda out: write(out, records(out)[:-1]),
}


@pytest.mark.parametrize("change", [None, *CHANGES])
def test_every_difference_is_seen_and_nothing_else(change: str | None, tmp_path: Path) -> None:
    for name in ("reference", "run"):
        leave(tmp_path / name)
    write(tmp_path / "run", [{**record, "time": 99} for record in records(tmp_path / "run")])
    if change is not None:
        CHANGES[change](tmp_path / "run")
    found = differences(tmp_path / "reference", tmp_path / "run", 4)
    assert [change is not None and change in one for one in found] == ([] if change is None else [True])
