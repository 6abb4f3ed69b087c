"""The training command and its checkpoints: damage, and a disk without room."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import REPOSITORY, run_ranks
from tests.tiny import command, equal
from visft_ds.checkpoint.format import newest_checkpoint

pytestmark = pytest.mark.slow


def words(shards: Path, out: Path) -> list[str]:
    extra: dict[str, object] = {"visft.run.save_every": 2, "visft.run.keep_last": 2}
    return ["launchers/train.py", *command(shards, out, extra=extra)]


@pytest.fixture(scope="module")
def straight(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run on one process."""
    out = tmp_path_factory.mktemp("runs") / "straight"
    run_ranks(words(shards, out), world=1)
    return out


def test_a_damaged_newest_checkpoint_is_named_and_replaced(shards: Path, straight: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(straight, out)
    damaged = out / "checkpoints/step_00000008/moments.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-7])
    (output,) = run_ranks(words(shards, out), world=1)
    assert f"warning: not used: {damaged}" in output and "from step 6" in output
    assert equal(out, straight)
    assert [path.name for path in sorted((out / "checkpoints").iterdir())] == ["step_00000006", "step_00000008"]


def test_a_disk_without_room_stops_the_run_with_one_line(shards: Path, straight: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(straight, out)
    shutil.rmtree(out / "checkpoints/step_00000008")
    largest = (straight / "checkpoints/step_00000006/moments.safetensors").stat().st_size // 1024 - 1
    done = subprocess.run(
        ["bash", "-c", f'ulimit -f {largest}; exec "$@"', "-", sys.executable, *words(shards, out)],
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
    run_ranks(words(shards, out), world=1)
    found, _ = newest_checkpoint(out / "checkpoints")
    assert found is not None and found.step == 8
