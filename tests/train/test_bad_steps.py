"""A bad step and a leap of the loss in a real run of two ranks, passed over, told, stopped and resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.ranks import finish, run_ranks, start_ranks
from tests.tiny import command, steps_recorded, trained
from visft_ds.resilience.replay import main as replay

BAD, LEAP, STEPS = 3, 25, 30
EXTRA = {
    "scheduler.params.total_num_steps": STEPS,
    "visft.run.save_every": 1,
    "visft.run.keep_last": 100,
    "visft.run.skip_bad_steps": 1,
}


@pytest.mark.slow
def test_they_are_passed_over_and_a_resumed_run_does_the_same(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    arguments = ["-m", "tests.train.bad_step_case", str(BAD), str(LEAP), *command(shards, out, extra=EXTRA)]
    said = run_ranks(arguments)[0]
    assert f"step {BAD + 1} (shared): the loss is nan, no update was made on any rank" in said
    assert "rank 1: loss is nan" in said and "rank 0:" not in said
    assert f"step {LEAP + 1} (shared): loss" in said and "the update was made" in said.split("leaps: ")[1]
    assert steps_recorded(out) == list(range(1, STEPS + 1))
    before, after = trained(out, BAD), trained(out, BAD + 1)
    assert all(torch.equal(before[name], value) for name, value in after.items())
    expected = trained(out, STEPS)

    # Healthy numbers come up again: what disturbed them is not in the run's records, as with a faulty machine.
    assert [path.name for path in (out / "refused").iterdir()] == [f"step_{BAD:08d}"]  # not the leap
    kept = trained(out, BAD, "refused")
    assert all(torch.equal(kept[name], value) for name, value in trained(out, BAD).items())
    assert replay([str(out), "--step", str(BAD + 1)]) == 0
    found = capsys.readouterr().out
    assert "in the run: step 4 (shared): the loss is nan" in found and "rank 1: loss is nan" in found
    assert found.count("everything is finite") == 4 and "faulty hardware" in found

    for step in range(LEAP, STEPS + 1):  # as if the run had been killed one step before the leap
        for file in (out / "checkpoints" / f"step_{step:08d}").iterdir():
            file.unlink()
        (out / "checkpoints" / f"step_{step:08d}").rmdir()
    said = run_ranks(arguments)[0]
    assert f"from step {LEAP - 1}" in said and "leaps: " in said
    assert all(torch.equal(value, expected[name]) for name, value in trained(out, STEPS).items())


@pytest.mark.slow
@pytest.mark.parametrize("engine", [(), ("--engine=pipeline", "--set=pipeline.stages=2")], ids=("zero1", "pipeline"))
def test_one_more_than_allowed_stops_all_ranks(
    engine: tuple[str, ...], shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a pipeline the pixels are on rank 0 and the labels on rank 1; one process has both."""
    out, extra = tmp_path / "run", {**EXTRA, "visft.run.skip_bad_steps": 0}
    arguments = ["-m", "tests.train.bad_step_case", str(BAD), str(LEAP), *engine]
    codes, outputs = finish(start_ranks([*arguments, *command(shards, out, extra=extra)]))
    assert codes == [4, 4], outputs
    assert f"the last good checkpoint is that of step {BAD}" in outputs[0]
    assert "Traceback" not in "".join(outputs)
    assert f"visft replay {out} --step {BAD + 1}" in outputs[0]
    assert replay([str(out), "--step", str(BAD + 1)]) == 0
    found = capsys.readouterr().out
    assert "rank 1: loss is nan" in found and found.count("everything is finite") == 4
