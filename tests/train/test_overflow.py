"""fp16 in real runs of two ranks: a loss scale that begins too high finds its place, a collapse of it ends the run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.ranks import finish, run_ranks, start_ranks
from tests.tiny import command

pytestmark = pytest.mark.slow

STEPS, FACTOR = 24, 1e12
CASE = "tests.train.overflow_case"
ENGINES = {
    "zero1": ("--engine=zero1",),
    "zero3": ("--engine=zero3",),
    "pipeline": ("--engine=pipeline", "--set=pipeline.stages=2"),
}


@pytest.fixture(scope="module")
def heads(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What stage 2 learns from."""
    out = tmp_path_factory.mktemp("heads") / "stage1"
    extra = {"scheduler.params.total_num_steps": 1, "scheduler.params.warmup_num_steps": 0}
    run_ranks(["launchers/train.py", *command(shards, out, extra=extra)], world=1)
    return out / "export"


def arguments(shards: Path, out: Path, heads: Path) -> list[str]:
    extra = {
        "visft.model.precision": "fp16",
        "visft.heads.path": str(heads),
        "visft.lora.rank": 2,
        "scheduler.params.total_num_steps": STEPS,
        "visft.run.save_every": 2,
    }
    return command(shards, out, stage=2, extra=extra)


def records(out: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "step" and "loss_scale" in line]


@pytest.mark.parametrize("engine", ENGINES)
def test_overflows_at_the_beginning_are_no_reason_to_stop(
    engine: str, shards: Path, heads: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    said = run_ranks(["-m", CASE, "0", "1e3", *ENGINES[engine], *arguments(shards, out, heads)])[0]
    assert "the gradient overflows" not in said
    found = records(out)
    assert [line["step"] for line in found] == list(range(1, STEPS + 1))
    overflowed = [bool(line["skipped"]) for line in found]
    assert 0 < sum(overflowed) < STEPS // 2 and not any(line["refused"] for line in found)
    assert [line["loss_scale"] for line in found] == [65536 / 2 ** sum(overflowed[:step]) for step in range(STEPS)]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_collapse_stops_all_ranks_and_names_what_overflows(
    engine: str, shards: Path, heads: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    ranks = start_ranks(["-m", CASE, "4", str(FACTOR), *ENGINES[engine], *arguments(shards, out, heads)])
    codes, outputs = finish(ranks)
    assert codes == [4, 4], outputs
    said = outputs[0]
    assert "Traceback" not in "".join(outputs) and "error" not in outputs[1]
    (step,) = re.findall(r"error: step (\d+) \(\w+\): the gradient overflows in fp16 at a loss scale of 1,", said)
    # Passed-over steps change nothing, so all checkpoints since the loss grew hold the same weights.
    assert f"the last good checkpoint is that of step {(int(step) - 1) // 2 * 2}" in said
    first = r"rank \d: it begins with the gradient of (the output of|parameter) backbone\.blocks\.\d"
    assert re.search(first, said), said
