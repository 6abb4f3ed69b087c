"""A run as somebody sees it who sits before it: its output, its processes, its folder."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from tests.ranks import REPOSITORY

#: A variable of the environment by which every process of a trial is found, whoever its parent is by now.
MARK = "VISFT_SOAK"
#: Seconds for any process of a run to end by itself.
GRACE = 600.0
_STEP, _FROM = re.compile(r"^step (\d+)/\d+ "), re.compile(r"^ +steps +\d+(?:, from step (\d+))?$")
_RESTART = re.compile(r"^\[restart\] .*; restart \d+$")


class SoakFailed(Exception):
    """The run did not do what it promises."""


class Trial:
    """A run under `tests.soak.restart`: the command of each start, the run folder, and a log of all
    starts.
    """

    def __init__(self, command: Sequence[str], out: Path, log: Path) -> None:
        self._command, self.out, self.log = command, out, log
        self._mark = uuid.uuid4().hex
        self._file = log.open("ab")
        self._read = 0
        self.process: subprocess.Popen[bytes] | None = None
        self.lines: list[str] = []
        self.starts, self.restarts = 0, 0
        self.step = 0  #: last step that was printed since the last start or restart; 0 before the first
        self.reached = 0  #: last step that was ever printed
        self.lost: list[int] = []  #: of each attempt but the first: steps that are made again
        self._attempts = 0

    def start(self) -> None:
        """Start the command in a session of its own."""
        self.starts, self.step = self.starts + 1, 0
        environment = {**os.environ, MARK: self._mark, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            self._command,
            cwd=REPOSITORY,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self._file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def look(self) -> None:
        """Take note of what was printed meanwhile."""
        with self.log.open("rb") as file:
            file.seek(self._read)
            new = file.read()
        whole = new.rfind(b"\n") + 1
        self._read += whole
        for line in new[:whole].decode(errors="replace").splitlines():
            self._note(line)

    def _note(self, line: str) -> None:
        self.lines.append(line)
        if match := _STEP.match(line):
            self.step = self.reached = int(match[1])
        elif _RESTART.match(line):
            self.restarts, self.step = self.restarts + 1, 0
        elif match := _FROM.match(line):
            start = int(match[1] or 0)
            if self._attempts:
                self.lost.append(max(0, self.reached - start))
            self._attempts, self.reached = self._attempts + 1, start

    def wait_for(self, condition: Callable[[], bool], what: str, seconds: float = 600.0) -> None:
        """Look until something holds."""
        until = time.monotonic() + seconds
        while True:
            self.look()
            if condition():
                return
            if time.monotonic() > until:
                raise SoakFailed(f"{what}: not within {seconds:.0f} s. The last lines:\n" + self.tail())
            time.sleep(0.05)

    def wait_for_step(self, step: int) -> None:
        """Wait until the run has made a step."""
        self.wait_for(lambda: self.step >= step or self.ended, f"step {step}", seconds=1800)
        if self.step < step:
            raise SoakFailed(
                f"the run ended with {self.code()} before step {step}. The last lines:\n{self.tail()}"
            )

    def wait_for_end(self) -> int:
        """Wait for the command, then for every process that it ever started. Returns its exit code."""
        self.wait_for(lambda: self.ended, "the end of the command")
        self.wait_for(lambda: not self.processes(), "the end of all processes", GRACE)
        return self.code()

    @property
    def ended(self) -> bool:
        """Whether the command has ended."""
        return self._started.poll() is not None

    def code(self) -> int:
        """Exit code of the command; minus the number of a signal."""
        return self._started.wait()

    @property
    def _started(self) -> subprocess.Popen[bytes]:
        assert self.process is not None
        return self.process

    def processes(self) -> list[psutil.Process]:
        """All processes of this trial."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def find(self, target: str, rank: int = 0) -> psutil.Process:
        """The command, or the training process of a rank."""
        if target == "command":
            return psutil.Process(self._started.pid)
        for process in psutil.Process(self._started.pid).children():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("RANK") == str(rank):
                    return process
        raise SoakFailed(f"no process is the {target} {rank}. The last lines:\n{self.tail()}")

    def kill_all(self) -> None:
        """SIGKILL to every process, as when the power goes."""
        until = time.monotonic() + GRACE
        while left := self.processes():
            assert time.monotonic() < until, left
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            self._started.poll()  # collects it
            time.sleep(0.05)

    def tail(self, count: int = 25) -> str:
        """The last lines of the output."""
        self.look()
        return "\n".join(line[:400] for line in self.lines[-count:])

    def __enter__(self) -> Trial:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill_all()
        self._file.close()
