"""A bad step in a real run of two ranks, passed over or stopped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.ranks import finish, run_ranks, start_ranks
from tests.tiny import STEPS, command, steps_recorded, trained

pytestmark = pytest.mark.slow

BAD = 3
EXTRA = {"visft.run.save_every": 1, "visft.run.keep_last": 100}
CASE = ["-m", "tests.train.bad_step_case", str(BAD)]


def test_a_bad_step_is_passed_over_where_that_is_allowed(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    said = run_ranks([*CASE, *command(shards, out, extra={**EXTRA, "visft.run.skip_bad_steps": 1})])[0]
    assert f"step {BAD + 1} (shared): the loss is nan, no update was made on any rank" in said
    assert "rank 1: loss is nan" in said and "rank 0:" not in said
    assert steps_recorded(out) == list(range(1, STEPS + 1))
    before, after = trained(out, BAD), trained(out, BAD + 1)
    assert all(torch.equal(before[name], value) for name, value in after.items())


@pytest.mark.parametrize("engine", [(), ("--engine=pipeline", "--set=pipeline.stages=2")], ids=("zero1", "pipeline"))
def test_one_more_than_allowed_stops_all_ranks(engine: tuple[str, ...], shards: Path, tmp_path: Path) -> None:
    codes, outputs = finish(start_ranks([*CASE, *engine, *command(shards, tmp_path / "run", extra=EXTRA)]))
    assert codes == [4, 4], outputs
    assert f"the last good checkpoint is that of step {BAD}" in outputs[0]
    assert "Traceback" not in "".join(outputs)
    # What disturbs the loss is no module: made again, outputs are finite, and what flows back is not.
    assert "rank 1: it begins with the gradient of" in outputs[0]
