"""A rank that hangs ends itself and says where; one whose peer is gone says so, and lets the other end first."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import REPOSITORY, finish, start_ranks, wait_for
from tests.tiny import command
from visft_ds.resilience import watchdog
from visft_ds.resilience.errors import LostRank
from visft_ds.resilience.watchdog import Watchdog

HANGS = """
import time
from visft_ds.resilience.watchdog import Watchdog
with Watchdog(1, 1.0).watching() as dog:
    dog.begin("evaluating", timed=False)
    time.sleep(3)
    dog.begin("step 7: reading")
    time.sleep(600)
"""


def test_no_progress_ends_the_process_with_its_stacks() -> None:
    words = [sys.executable, "-c", HANGS]
    done = subprocess.run(words, capture_output=True, text=True, cwd=REPOSITORY, timeout=600)
    assert done.returncode == 3
    assert "[rank 1] stopped: no progress for" in done.stderr and "step 7: reading" in done.stderr
    assert "most recent call first" in done.stderr and 'File "<string>", line 8' in done.stderr


def test_a_lost_peer_is_told_with_the_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "_AFTER_YOU", 0.0)
    dog = Watchdog(0, 0.0)

    def lose() -> None:
        with dog.watching():
            dog.begin("step 3: saving")
            raise RuntimeError("Connection closed by peer [127.0.0.1]:4242")

    with pytest.raises(LostRank, match="step 3: saving"):
        lose()


@pytest.mark.slow
def test_the_same_command_goes_on_after_a_killed_rank(shards: Path, tmp_path: Path) -> None:
    extra = {"scheduler.params.total_num_steps": 100_000, "visft.run.save_every": 2}
    arguments = ["launchers/train.py", *command(shards, tmp_path / "run", extra=extra)]
    processes = start_ranks(arguments)
    wait_for(processes[0], "step 5/")
    processes[1].kill()
    codes, outputs = finish(processes, timeout=600)
    assert codes == [3, -9] and "another rank ended first" in outputs[0], outputs
    processes = start_ranks(arguments)
    lines = wait_for(processes[0], "img/s")
    for process in processes:
        process.terminate()
    codes, outputs = finish(processes, timeout=600)
    assert codes == [143, 143] and "from step" in "".join(lines), outputs
