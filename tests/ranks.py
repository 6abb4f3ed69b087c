"""Starting several ranks of a program the way a launcher does, without its own seconds, nor those of
imports.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import select
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock

REPOSITORY = Path(__file__).resolve().parents[1]
#: Names the folder of `shared` to the processes that pytest starts.
SHARED = "VISFT_TESTS_SHARED"
#: What gloo of torch 2.10 prints to standard output of each process group.
_GLOO = re.compile(r"^\[Gloo\] Rank .*\n", re.MULTILINE)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _started(
    command: Sequence[str], environment: Mapping[str, str], *, alone: bool = False
) -> subprocess.Popen[str]:
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=REPOSITORY, env=environment, start_new_session=alone, **pipes)


def shared() -> Path:
    """A folder that processes which test side by side have in common; it goes with the first of them."""
    if SHARED not in os.environ:  # a program of tests: pytest has set it
        folder = tempfile.mkdtemp(prefix="visft-tests-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        os.environ[SHARED] = folder
    return Path(os.environ[SHARED])


@cache
def _zygote(rank: int) -> socket.socket:
    """A connection to the `tests.zygote` of this rank, which ends with the last of its connections."""
    address = str(shared() / f"zygote-{rank}")
    ours = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with FileLock(f"{address}.lock"):
        try:
            ours.connect(address)
        except (FileNotFoundError, ConnectionRefusedError):
            Path(address).unlink(missing_ok=True)
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as theirs:
                theirs.bind(address)
                theirs.listen()
                ours.connect(address)
                process = subprocess.Popen(
                    [sys.executable, "-m", "tests.zygote", str(theirs.fileno())],
                    cwd=REPOSITORY,
                    env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
                    pass_fds=[theirs.fileno()],
                )
            atexit.register(process.wait)
    atexit.register(ours.close)
    return ours


class Forked(subprocess.Popen[str]):
    """A process that was forked by a zygote instead of started; output and errors come through one pipe."""

    _child_created = False  #: for `Popen`, which would collect it

    def __init__(self, rank: int, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        (output, to_output), (self._status, to_status) = os.pipe(), os.pipe()
        request = {"arguments": list(arguments), "environment": dict(environment), "folder": str(REPOSITORY)}
        socket.send_fds(_zygote(rank), [json.dumps(request).encode()], [to_output, to_status])
        os.close(to_output)
        os.close(to_status)
        self.args, self.stdin, self.stderr = arguments, None, None
        self.stdout = open(output)  # noqa: SIM115 - closed by who reads it, as Popen's
        self.pid, self.returncode = self._told(), None  # type: ignore[assignment]

    def _told(self) -> int:
        return int(struct.unpack("i", os.read(self._status, 4))[0])

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self.returncode = self._told()
            os.close(self._status)
        return self.returncode

    def send_signal(self, sig: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, sig)

    def communicate(self, input: str | None = None, timeout: float | None = None) -> tuple[str, str]:
        read: list[str] = []
        assert self.stdout is not None
        thread = threading.Thread(
            target=lambda stream: read.append(stream.read()), args=[self.stdout], daemon=True
        )
        thread.start()
        thread.join(timeout)
        if thread.is_alive():
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        self.stdout.close()
        self.wait(timeout)
        return read[0], ""


def start_ranks(
    arguments: Sequence[str], world: int = 2, *, fresh: bool = False
) -> list[subprocess.Popen[str]]:
    """Start `python ARGUMENTS` once for each rank; output and errors of a rank come through one pipe.

    Args:
        fresh: start interpreters, whose memory and whose end are those of real ranks.
    """
    port = str(free_port())
    processes: list[subprocess.Popen[str]] = []
    for rank in range(world):
        environment = {
            **os.environ,
            **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)},
            **{
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "OMP_NUM_THREADS": "1",
                "PYTHONUNBUFFERED": "1",
            },
        }
        started = (
            _started([sys.executable, *arguments], environment)
            if fresh
            else Forked(rank, arguments, environment)
        )
        processes.append(started)
    return processes


def finish(processes: Sequence[subprocess.Popen[str]], timeout: float = 900) -> tuple[list[int], list[str]]:
    """Wait for all ranks: exit codes and what each printed."""
    try:
        outputs = [_GLOO.sub("", process.communicate(timeout=timeout)[0]) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], outputs


def python(*words: object, folder: Path = REPOSITORY, code: int = 0, **environment: str) -> str:
    """What `python WORDS` prints to both streams in an interpreter of its own; it has to end with `code`."""
    given = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, *map(str, words)]
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run(command, cwd=folder, env=given, timeout=900, **streams)
    assert done.returncode == code, done.stdout
    return done.stdout


def deepspeed(arguments: Sequence[str], world: int = 2) -> list[str]:
    """The `deepspeed` command that runs a script of this repository on ranks of this machine."""
    start = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(world)]
    return [*start, "--master_port", str(free_port()), *arguments]


def start_command(command: Sequence[str]) -> subprocess.Popen[str]:
    """Start a command in a session of its own; output and errors come through one pipe."""
    return _started(command, {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}, alone=True)


@contextmanager
def family_of(process: subprocess.Popen[str]) -> Iterator[list[psutil.Process]]:
    """A list for the processes that a command has started, none of which may be left when the block ends."""
    family: list[psutil.Process] = []
    try:
        yield family
        assert psutil.wait_procs(family, timeout=600)[1] == []
    finally:
        for left in [
            *(one for one in family if one.is_running()),
            *([process] if process.poll() is None else []),
        ]:
            left.kill()


def wait_for(process: subprocess.Popen[str], text: str) -> list[str]:
    """Read a process's output up to a line that contains `text`; returns the lines."""
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if text in line:
            return seen
    raise AssertionError(f"{text!r} never came:\n" + "".join(seen))


def run_ranks(arguments: Sequence[str], world: int = 2, *, fresh: bool = False) -> list[str]:
    """Run all ranks to the end; fails with their output unless every one succeeds."""
    codes, outputs = finish(start_ranks(arguments, world, fresh=fresh))
    assert codes == [0] * world, "\n".join(outputs)
    return outputs
