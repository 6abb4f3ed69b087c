"""The training command and its checkpoints: the best one, damage, a disk without room, another topology."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.ranks import REPOSITORY, run_ranks
from tests.tiny import TINY
from visft_ds.checkpoint.format import newest_checkpoint, open_checkpoint, saved_steps

STEPS = 8
SETTINGS = {
    **TINY,
    "visft.tasks.detection.head.dropout": 0.0,  # masks are drawn by rank: other ranks, other masks
    "visft.tasks.captioning.head.dropout": 0.0,
    "scheduler.params.total_num_steps": STEPS,
    "scheduler.params.warmup_num_steps": 2,
    "visft.run.save_every": 2,
    "visft.run.log_every": 1,
    "visft.run.keep_last": 2,
}
pytestmark = pytest.mark.slow


def command(shards: Path, out: Path, *, engine: str = "zero1", extra: dict[str, object] | None = None) -> list[str]:
    settings = [f"--set={key}={json.dumps(value)}" for key, value in {**SETTINGS, **(extra or {})}.items()]
    flags = ["--stage", "1", "--model", "debug", "--engine", engine, "--data", str(shards), "--out", str(out)]
    return ["launchers/train.py", *flags, *settings]


@pytest.fixture(scope="module")
def straight(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run on one process."""
    out = tmp_path_factory.mktemp("runs") / "straight"
    run_ranks(command(shards, out), world=1)
    return out


def test_saves_are_recorded(straight: Path) -> None:
    records = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    saves = [record for record in records if record["kind"] == "save"]
    assert [record["step"] for record in saves] == [2, 4, 6, 8]
    assert all(record["save/stall_seconds"] > 0 and record["save/write_seconds"] > 0 for record in saves)


@pytest.mark.parametrize(("engine", "world"), [("zero3", 2), ("zero3_offload", 1), ("zero0", 2)])
def test_goes_on_under_another_engine_on_other_ranks(
    shards: Path, straight: Path, tmp_path: Path, engine: str, world: int
) -> None:
    """Data position, schedule and weights: what one process would have learnt without interruption."""
    out = tmp_path / "run"
    shutil.copytree(straight, out)
    shutil.rmtree(out / "checkpoints/step_00000008")
    (output, *_) = run_ranks(command(shards, out, engine=engine), world)
    assert "from step 6" in output
    ours, expected = (open_checkpoint(run / "checkpoints/step_00000008").load() for run in (out, straight))
    assert ours.updates == expected.updates == STEPS
    # Two more steps of Adam: the sums of a step are rounded in another order.
    differences = [float((ours.parameters[name] - v).abs().max()) for name, v in expected.parameters.items()]
    assert max(differences) < 1e-5
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    straight_steps = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    for mine, theirs in zip(
        (r for r in steps if r["kind"] == "step"), (r for r in straight_steps if r["kind"] == "step"), strict=True
    ):
        assert mine["loss/loss"] == pytest.approx(theirs["loss/loss"], rel=1e-5)
        assert {k: v for k, v in mine.items() if k.startswith("lr/")} == {
            k: v for k, v in theirs.items() if k.startswith("lr/")
        }


def test_a_damaged_newest_checkpoint_is_named_and_replaced(shards: Path, straight: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(straight, out)
    damaged = out / "checkpoints/step_00000008/moments.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-7])
    (output,) = run_ranks(command(shards, out), world=1)
    assert f"warning: not used: {damaged}" in output and "from step 6" in output
    for name in ("parameters", "moments"):
        ours, expected = (load_file(run / f"checkpoints/step_00000008/{name}.safetensors") for run in (out, straight))
        assert all(torch.equal(ours[key], value) for key, value in expected.items())
    assert [path.name for path in sorted((out / "checkpoints").iterdir())] == ["step_00000006", "step_00000008"]


def test_a_disk_without_room_stops_the_run_with_one_line(shards: Path, straight: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(straight, out)
    shutil.rmtree(out / "checkpoints/step_00000008")
    largest = (straight / "checkpoints/step_00000006/moments.safetensors").stat().st_size // 1024 - 1
    done = subprocess.run(
        ["bash", "-c", f'ulimit -f {largest}; exec "$@"', "-", sys.executable, *command(shards, out)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if "checkpoint" in line]
    assert len(lines) == 1 and lines[0].startswith("error: the checkpoint of step 8 cannot be written")
    assert "Traceback" not in done.stderr
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step_00000006"]
    run_ranks(command(shards, out), world=1)
    found, _ = newest_checkpoint(out / "checkpoints")
    assert found is not None and found.step == 8


def test_the_best_checkpoint_stays(shards: Path, tmp_path: Path) -> None:
    extra = {
        "visft.run.keep_best": "caption/CIDEr",
        "visft.run.eval_every": 2,
        "visft.run.keep_last": 1,
        "visft.data.val": "train",
        "visft.run.pictures": 0,
    }
    out = tmp_path / "run"
    (output,) = run_ranks(command(shards, out, extra=extra), world=1)
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    scores = {r["step"]: r["val/caption/CIDEr"] for r in records if "val/caption/CIDEr" in r}
    assert list(scores) == [2, 4, 6, 8]
    best = max(scores, key=lambda step: (scores[step], -step))
    assert saved_steps(out / "checkpoints") == sorted({best, 8})
    assert "(best so far)" in output
