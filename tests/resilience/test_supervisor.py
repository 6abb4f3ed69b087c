"""When a lost run is started again, and when it is given up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.ranks import family_of, start_command, wait_for
from tests.resilience.test_stop import ranks_below
from tests.tiny import command
from visft_ds.resilience import processes, supervisor
from visft_ds.resilience.supervisor import GAVE_UP, main

#: (step that an attempt saves, how it ends) of each attempt; the exit status; how many attempts are made.
CASES = {
    "lost, then done": ([(1, 3), (2, 1), (3, 0)], 0, 3),
    "a mistake": ([(1, 2)], 2, 1),
    "diverged": ([(1, 4)], 4, 1),
    "a server was away": ([(1, 5), (2, 0)], 0, 2),
    "stopped": ([(1, 143)], 143, 1),
    "queued again": ([(1, 85)], 85, 1),
    "no progress": ([(1, 3)] * 9, GAVE_UP, 4),
    "too often": ([(step, 3) for step in range(1, 9)], GAVE_UP, 6),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_started_again(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempts, status, count = CASES[name]
    left = list(attempts)

    def start(words: list[str], ranks: int) -> int:
        assert words[:3] == ["train", "--stage", "1"] and ranks == 2
        step, code = left.pop(0)
        (tmp_path / f"checkpoints/step_{step:08d}").mkdir(parents=True, exist_ok=True)
        return code

    monkeypatch.setattr(supervisor, "start_ranks", start)
    train = ["visft", "train", "--num_gpus", "2", "--stage", "1", "--model", "debug", "--out", str(tmp_path)]
    assert main(["--max-restarts", "5", "--backoff", "0", "--", *train]) == status
    assert len(attempts) - len(left) == count


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--", "deepspeed", "other.py"], "training"),
        (["--backoff", "nan", "--", "visft", "train"], "backoff"),
        (["--", "visft", "train", "--stage", "1", "--model", "debug", "--resume", "no"], "--resume"),
        (["--", "visft", "train", "--stage", "1", "--model", "debug", "--dry-run"], "--dry-run"),
    ],
)
def test_a_command_that_cannot_work_is_refused(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert told in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_rank_costs_a_restart_and_a_signal_ends_it(shards: Path, tmp_path: Path) -> None:
    extra: dict[str, object] = {"scheduler.params.total_num_steps": 100_000, "visft.run.save_every": 2}
    train = ["visft", "train", "--num_gpus", "2", *command(shards, tmp_path / "run", extra=extra)]
    process = start_command([sys.executable, "launchers/supervise.py", "--backoff", "0.5", "--", *train])
    with family_of(process) as family:
        wait_for(process, "step 3/")
        ranks_below(process.pid)[-1].kill()
        wait_for(process, "restart 1 of 3")
        wait_for(process, "img/s")
        family += psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=600)[0]
    assert process.returncode == 143, output
    assert "stopped after step" in output and "restart 2" not in output


@pytest.mark.parametrize("lost", [0, 1])
def test_a_rank_that_hangs_is_ended_after_another_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: int
) -> None:
    """As a stopped one does, which answers no signal."""
    program = tmp_path / "python"
    program.write_text(f'#!/bin/sh\n[ "$RANK" = {lost} ] && exit 3\nkill -STOP $$\n', encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(processes, "_GRACE", 0.5)
    assert processes.start_ranks(["train"], 2) == 3


def test_a_rank_that_cannot_start_leaves_none_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as the third of four on a machine that has no room for another process."""
    started: list[subprocess.Popen[bytes]] = []
    begin = subprocess.Popen

    def start(command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        if len(started) == 2:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        started.append(begin(["sleep", "600"], process_group=0))
        return started[-1]

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(subprocess, "Popen", start)
    with pytest.raises(BlockingIOError):
        processes.start_ranks(["train"], 4)
    assert [process.returncode for process in started] == [-signal.SIGKILL] * 2
    assert signal.getsignal(signal.SIGTERM) is before
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


@pytest.mark.parametrize("seconds", [0.0, 0.5])
def test_a_ctrl_c_during_the_start_of_ranks_ends_all_with_130_and_no_traceback(seconds: float) -> None:
    """Interpreters that begin would print tracebacks of their own."""
    words = [
        sys.executable,
        "-m",
        "visft_ds",
        "profile",
        "--num_gpus",
        "2",
        "--stage",
        "1",
        "--model",
        "debug",
    ]
    process = start_command([*words, "--synthetic"])
    with family_of(process) as family:
        until = time.monotonic() + 600
        while len(ranks := psutil.Process(process.pid).children()) < 2 and time.monotonic() < until:
            time.sleep(0.01)
        family += ranks
        time.sleep(seconds)
        os.killpg(process.pid, signal.SIGINT)
        output = process.communicate(timeout=600)[0]
    assert process.returncode == 130 and "Traceback" not in output, output
