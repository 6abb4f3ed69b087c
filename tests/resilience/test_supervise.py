"""The supervisor with the real command: a killed rank costs a restart, a signal or its own loss ends all cleanly."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.ranks import REPOSITORY, below, deepspeed, free_port, start_command, wait_for
from tests.resilience.test_signals import LONG
from tests.tiny import command


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
        output = process.communicate(timeout=600)[0]
        assert psutil.wait_procs(family, timeout=600)[1] == []
    finally:
        for left in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []:
            left.kill()
        process.kill()
    assert process.returncode == 0, output
    assert "stopped after step" in output and "restart 2" not in output


#: A rank without a launcher that it could miss: whether it stops, before and after a line comes in.
RANK = """
from visft_ds.resilience.signals import StopFlag
stop = StopFlag(launched=False)
print(bool(stop))
input()
print(bool(stop))
"""
#: A program that runs another one and waits for it.
BETWEEN = ["-c", "import subprocess, sys; sys.exit(subprocess.run([sys.executable, *sys.argv[1:]]).returncode)"]
#: What stands between the supervisor and a rank.
LAUNCHERS = {"none": [], "torchrun": BETWEEN, "deepspeed": [*BETWEEN, *BETWEEN]}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_rank_misses_its_supervisor(launcher: str, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(RANK)
    supervised = [sys.executable, *LAUNCHERS[launcher], str(script), "--stage", "1", "--model", "debug"]
    supervisor = subprocess.Popen(
        [sys.executable, "launchers/supervise.py", "--max-restarts", "0", "--", *supervised],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
    )
    assert supervisor.stdin is not None and supervisor.stdout is not None
    assert supervisor.stdout.readline() == "False\n"
    supervisor.kill()
    os.waitid(os.P_PID, supervisor.pid, os.WEXITED | os.WNOWAIT)  # what nobody has collected yet is gone as well
    supervisor.stdin.write("\n")
    supervisor.stdin.close()
    assert supervisor.stdout.readline() == "True\n"
    supervisor.stdout.close()
    supervisor.wait()


def training(launcher: str, arguments: list[str]) -> list[str]:
    train = ["launchers/train.py", *arguments]
    if launcher == "deepspeed":
        return deepspeed(train)
    if launcher == "torchrun":
        start = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
        return [sys.executable, *start, *train]
    return [sys.executable, *train]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_killed_supervisor_leaves_nobody_behind(launcher: str, shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train = training(launcher, command(shards, out, extra=LONG))
    process = start_command([sys.executable, "launchers/supervise.py", "--", *train])
    family: list[psutil.Process] = []
    try:
        wait_for(process, "step 2/")
        family = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        output = process.communicate(timeout=600)[0]
        assert psutil.wait_procs(family, timeout=600)[1] == []
    finally:
        for left in family:
            if left.is_running():
                left.kill()
        process.kill()
    assert re.search(r"stopped after step \d+ \((the supervisor is gone|asked by another rank)\)", output), output
    assert "Traceback" not in output and "restart" not in output
    (checkpoint,) = (out / "checkpoints").iterdir()
    assert f"saved step {int(checkpoint.name[5:])} in" in output
