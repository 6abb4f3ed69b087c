"""Starting several ranks of a program the way a launcher does, without the launcher's own seconds."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).resolve().parents[1]


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_ranks(arguments: Sequence[str], world: int = 2) -> list[subprocess.Popen[str]]:
    """Start `python ARGUMENTS` once for each rank; output and errors of a rank come through one pipe."""
    port = str(free_port())
    processes = []
    for rank in range(world):
        environment = {
            **os.environ,
            **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)},
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        }
        processes.append(
            subprocess.Popen(
                [sys.executable, *arguments],
                cwd=REPOSITORY,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return processes


def finish(processes: Sequence[subprocess.Popen[str]], timeout: float = 600) -> tuple[list[int], list[str]]:
    """Wait for all ranks: exit codes and what each printed."""
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], outputs


def deepspeed(arguments: Sequence[str], world: int = 2) -> list[str]:
    """The `deepspeed` command that runs a script of this repository on ranks of this machine."""
    start = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(world)]
    return [*start, "--master_port", str(free_port()), *arguments]


def start_command(command: Sequence[str]) -> subprocess.Popen[str]:
    """Start a command in a session of its own; output and errors come through one pipe."""
    return subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for(process: subprocess.Popen[str], text: str) -> list[str]:
    """Read a process's output up to a line that contains `text`; returns the lines."""
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if text in line:
            return seen
    raise AssertionError(f"{text!r} never came:\n" + "".join(seen))


def below(pid: int, program: str) -> list[psutil.Process]:
    """Processes under `pid` that run a program of this name, in the order of their ranks."""
    found = [p for p in psutil.Process(pid).children(recursive=True) if program in p.cmdline()]
    return sorted(found, key=lambda process: int(process.environ().get("RANK", "-1")))


def run_ranks(arguments: Sequence[str], world: int = 2) -> list[str]:
    """Run all ranks to the end; fails with their output unless every one succeeds."""
    codes, outputs = finish(start_ranks(arguments, world))
    assert codes == [0] * world, "\n".join(outputs)
    return outputs
