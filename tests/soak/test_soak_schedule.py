"""The soak itself: its schedule is a function of the seed, and it sees every kind of difference."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from tests.checkpoint.faulty_disk import state
from tests.soak.compare import differences
from tests.soak.schedule import HARM, REQUESTS, schedule
from tests.soak.trial import Trial
from visft_ds.checkpoint.format import save_checkpoint
from visft_ds.parallel.state import EngineState


def test_the_seed_alone_decides_and_a_longer_run_has_the_same_faults_and_more() -> None:
    short, long = schedule(3, gap=40, last=500), schedule(3, gap=40, last=4000)
    assert long[: len(short)] == short != schedule(4, gap=40, last=500)
    assert max(fault.step for fault in long) <= 4000
    steps = [fault.step for fault in long]
    assert all(20 <= after - before <= 60 for before, after in pairwise(steps))
    assert {fault.kind.name for fault in long} == {kind.name for kind in (*HARM, *REQUESTS)}
    first = long[: 2 * len(HARM)]
    assert sorted(fault.kind.name for fault in first[::2]) == sorted(kind.name for kind in HARM)


def leave(out: Path) -> None:
    """What a run of four steps leaves."""
    for step in (2, 4):
        save(out, step, state(step))
    (out / "export" / "adapter").mkdir(parents=True)
    (out / "export" / "adapter" / "adapter_config.json").write_text("{}")
    records = [{"kind": "step", "step": n, "loss/loss": 1 / n, "data_seconds/read": n, "time": n} for n in range(1, 5)]
    records.append({"kind": "step", "step": 4, "val/box/AP": 0.5, "time": 1})
    write(out, records)


def write(out: Path, records: list[dict[str, object]]) -> None:
    (out / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def records(out: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def other_moments(out: Path) -> None:
    one = state(4)
    one.moments["exp_avg"]["c"] = one.moments["exp_avg"]["c"].nextafter(one.moments["exp_avg"]["c"] + 1)
    save(out, 4, one)


def save(out: Path, step: int, what: EngineState) -> None:
    save_checkpoint(out / "checkpoints", step, what, {})


CHANGES: dict[str, Callable[[Path], None]] = {
    "exp_avg c: up to 2.": other_moments,
    "9 updates, expected 4": lambda out: save(out, 4, replace(state(4), updates=9)),
    "checkpoints of steps [2, 3, 4]": lambda out: save(out, 3, state(3)),
    "adapter_config.json: other bytes": lambda out: os.truncate(out / "export/adapter/adapter_config.json", 1),
    "export/adapter/adapter_config.json: missing": lambda out: (out / "export/adapter/adapter_config.json").unlink(),
    "more than once [2]": lambda out: write(out, [*records(out), records(out)[1]]),
    "missing [3]": lambda out: write(out, [one for one in records(out) if one["step"] != 3]),
    "1 steps with other numbers, the first is 1": lambda out: write(
        out, [{**one, "loss/loss": 2.0} if one["step"] == 1 else one for one in records(out)]
    ),
    "evaluations of []": lambda out: write(out, records(out)[:-1]),
    "evaluations with other numbers: [4]": lambda out: write(
        out, [*records(out)[:-1], {**records(out)[-1], "val/box/AP": 0.6}]
    ),
    "left behind: rank_0.tmp": lambda out: (out / "rank_0.tmp").touch(),
}


@pytest.mark.parametrize("change", [None, *CHANGES])
def test_every_difference_is_seen_and_nothing_else(change: str | None, tmp_path: Path) -> None:
    for name in ("reference", "run"):
        leave(tmp_path / name)
    written = records(tmp_path / "run")
    write(tmp_path / "run", [{**one, "time": 99, "data_seconds/read": 7} for one in written])
    if change is not None:
        CHANGES[change](tmp_path / "run")
    found = differences(tmp_path / "reference", tmp_path / "run", 4)
    assert [change is not None and change in one for one in found] == ([] if change is None else [True])


def test_lost_steps_are_counted_from_the_output(tmp_path: Path) -> None:
    with Trial(list, tmp_path, tmp_path / "log") as trial:
        for line in (
            "   steps      80",
            "step 29/80  detection 1.2",
            "[supervisor] the run ended with exit code 3 after 9 s; restart 1 of 9 from step 25 in 0.5 s",
            "   steps      80, from step 25",
            "[supervisor] the run ended with exit code 3 after 9 s; restart 2 of 9 from step 25 in 1 s",
            "   steps      80, from step 25",
            "step 26/80  detection 1.2",
        ):
            trial._file.write(f"{line}\n".encode())
        trial._file.flush()
        trial.look()
        assert (trial.lost, trial.restarts, trial.step) == ([4, 0], 2, 26)
        assert os.getpid() not in {process.pid for process in trial.processes()}
