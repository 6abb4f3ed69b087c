"""Ranks that are started together: their common end, and what starts them again."""

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
from tests.tiny import command
from visft_ds.resilience import processes


@pytest.mark.slow
def test_torchrun_starts_a_killed_run_again(shards: Path, tmp_path: Path) -> None:
    """The command of docs/runs.md: from its newest checkpoint the run goes on, and torchrun ends with 0."""
    extra: dict[str, object] = {"scheduler.params.total_num_steps": 40, "visft.run.save_every": 5}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts", "2"]
    words = [
        "--nproc-per-node",
        "2",
        "-m",
        "visft_ds.launch",
        *command(shards, tmp_path / "run", extra=extra),
    ]
    process = start_command([*torchrun, *words])
    with family_of(process) as family:
        wait_for(process, "step 12/")
        ranks = psutil.Process(process.pid).children()
        family += ranks
        ranks[-1].kill()
        wait_for(process, "from step 10")
        output = process.communicate(timeout=600)[0]
    assert process.returncode == 0, output
    assert "step 11/40" in output and (tmp_path / "run" / "export" / "export.json").is_file()


_INTERRUPTED = (
    f"exec {sys.executable} -c 'import signal\n"
    "signal.signal(signal.SIGINT, signal.SIG_DFL)\n"
    "signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})\n"
    "signal.raise_signal(signal.SIGINT)'"
)


@pytest.mark.parametrize(
    ("lost", "end", "status"), [(0, "exit 3", 3), (1, "exit 3", 3), (1, _INTERRUPTED, 130)]
)
def test_a_rank_that_hangs_is_ended_after_another_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: int, end: str, status: int
) -> None:
    """As a stopped one does, which answers no signal, or one that waits inside torch for a rank that a Ctrl-C
    has ended.
    """
    program = tmp_path / "python"
    program.write_text(
        f'#!/bin/sh\nif [ "$RANK" = {lost} ]; then\n{end}\nfi\nkill -STOP $$\n', encoding="utf-8"
    )
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(processes, "_GRACE", 0.5)
    assert processes.start_ranks(["train"], 2) == status


#: A rank that gets a Ctrl-C, or two of which it hears the first.
_RANK = """
import signal
from visft_ds import cli
from visft_ds.resilience.stop import StopFlag

def train(words):
    if words == ["2"]:
        StopFlag(launched=False).listen()
        signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)

cli._run = train
cli.run()
"""


@pytest.mark.parametrize(("presses", "status"), [("1", -signal.SIGINT), ("2", 130)])
def test_after_a_second_ctrl_c_a_rank_lets_another_one_save(presses: str, status: int) -> None:
    """What ends by the signal has nothing to save, and the others are ended a second later."""
    command = [sys.executable, "-c", _RANK, presses]
    assert subprocess.run(command, env={**os.environ, "RANK": "1", "WORLD_SIZE": "2"}).returncode == status


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
