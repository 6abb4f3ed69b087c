"""The training command and a damaged checkpoint. (A disk without room: see the soak.)"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.ranks import run_ranks
from tests.tiny import command, equal

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


def test_a_damaged_newest_checkpoint_is_named_and_replaced(
    shards: Path, straight: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(straight, out)
    damaged = out / "checkpoints/step_00000008/moments.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-7])
    (output,) = run_ranks(words(shards, out), world=1)
    assert f"warning: not used: {damaged}" in output and "from step 6" in output
    assert equal(out, straight)
    assert [path.name for path in sorted((out / "checkpoints").iterdir())] == [
        "step_00000006",
        "step_00000008",
    ]
