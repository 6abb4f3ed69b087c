"""The supervisor with the real command: a killed rank costs a restart, a signal ends everything cleanly."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import psutil
import pytest

from tests.integration.ranks import below, deepspeed, start_command, wait_for
from tests.integration.test_train import command, shards

__all__ = ["shards"]  # a fixture


@pytest.mark.slow
def test_a_killed_rank_costs_a_restart_and_a_signal_ends_it(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    long = {"scheduler.params.total_num_steps": 100_000, "visft.run.save_every": 2}
    train = deepspeed(["launchers/train.py", *command(shards, out, extra=long)])
    process = start_command([sys.executable, "launchers/supervise.py", "--backoff", "0.5", "--", *train])
    try:
        wait_for(process, "step 3/")
        below(process.pid, "--local_rank=1")[-1].kill()
        lines = wait_for(process, "restart 1 of 3 from step ")
        assert any("rank 1" in line and "was killed, or out of memory" in line for line in lines), lines
        wait_for(process, "img/s")
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) >= 4  # deepspeed, its child, two ranks
        process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=60)[0]
        assert psutil.wait_procs(family, timeout=1)[1] == []
    finally:
        for left in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []:
            left.kill()
        process.kill()
    assert process.returncode == 0, output
    assert "stopped after step" in output and "restart 2" not in output
