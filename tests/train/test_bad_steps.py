"""Losses that are no numbers and overflows of fp16 in real runs of two ranks: passed over, or the end of the
run.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.ranks import finish, run_ranks, start_ranks
from tests.tiny import STEPS, command, records, steps_recorded, trained

pytestmark = pytest.mark.slow

BAD = 3
EXTRA: dict[str, object] = {"visft.run.save_every": 1, "visft.run.keep_last": 100}
ENGINES = {
    "zero1": ["--engine=zero1"],
    "zero3": ["--engine=zero3"],
    "pipeline": ["--engine=pipeline", "--set=pipeline.stages=2"],
}


def case(first: int, last: int, factor: float, rank: str, *arguments: str) -> list[str]:
    return ["-m", "tests.train.disturbed_case", str(first), str(last), str(factor), rank, *arguments]


def test_a_bad_step_is_passed_over_where_that_is_allowed(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    extra = {**EXTRA, "visft.run.skip_bad_steps": 1}
    said = run_ranks(case(BAD, BAD, float("nan"), "1", *command(shards, out, extra=extra)))[0]
    assert f"step {BAD + 1} (shared): the loss is nan, no update was made on any rank" in said
    assert "rank 1: loss is nan" in said and "rank 0:" not in said
    assert steps_recorded(out) == list(range(1, STEPS + 1))
    before, after = trained(out, BAD), trained(out, BAD + 1)
    assert all(torch.equal(before[name], value) for name, value in after.items())


@pytest.fixture(scope="module")
def heads(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What stage 2 learns from."""
    out = tmp_path_factory.mktemp("heads") / "stage1"
    extra: dict[str, object] = {"scheduler.params.total_num_steps": 1, "scheduler.params.warmup_num_steps": 0}
    run_ranks(["launchers/train.py", *command(shards, out, extra=extra)], world=1)
    return out / "export"


@pytest.mark.parametrize("engine", ENGINES)
def test_overflows_at_the_beginning_pass_and_a_collapse_ends_the_run(
    engine: str, shards: Path, heads: Path, tmp_path: Path
) -> None:
    steps = 24
    extra = {"visft.model.precision": "fp16", "visft.heads.path": str(heads), "visft.lora.rank": 2}
    extra |= {"scheduler.params.total_num_steps": steps, "visft.run.save_every": 2}
    out = tmp_path / "begins"
    arguments = [*ENGINES[engine], *command(shards, out, stage=2, extra=extra)]
    assert "the gradient overflows" not in run_ranks(case(0, steps, 1e3, "all", *arguments))[0]
    found = [record for record in records(out) if "loss_scale" in record]
    overflowed = [bool(line["skipped"]) for line in found]
    assert 0 < sum(overflowed) < steps // 2
    assert [line["loss_scale"] for line in found] == [
        65536 / 2 ** sum(overflowed[:step]) for step in range(steps)
    ]

    arguments = [*ENGINES[engine], *command(shards, tmp_path / "collapses", stage=2, extra=extra)]
    codes, outputs = finish(start_ranks(case(4, steps, 1e12, "all", *arguments)))
    assert codes == [4, 4] and "Traceback" not in "".join(outputs) and "error" not in outputs[1], outputs
    (step,) = re.findall(r"error: step (\d+) .* overflows in fp16 at the smallest loss scale, 1:", outputs[0])
    # Passed-over steps change nothing, so all checkpoints since the loss grew hold the same weights.
    assert f"the last good checkpoint is that of step {(int(step) - 1) // 2 * 2}" in outputs[0]
    first = r"rank \d: it begins with the gradient of (the output of|parameter) backbone\.blocks\.\d"
    assert re.search(first, outputs[0]), outputs[0]
