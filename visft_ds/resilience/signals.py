"""Stopping cleanly: signals, a lost launcher or supervisor become one flag that all ranks read at the step boundary.

Imports nothing heavy, so that what it offers is there before torch is.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
from types import FrameType
from typing import Any, TextIO

from visft_ds.resilience import processes
from visft_ds.resilience.errors import INTERRUPTED, LOST_CODE

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
#: The program between the `deepspeed` command and the ranks of a machine.
_LAUNCHER = "deepspeed.launcher.launch"
#: Where a supervisor says who it is, in the environment of its command.
_SUPERVISOR = "VISFT_SUPERVISOR"
_GONE = -2  # no process and no answer of `processes.parent`
#: Seconds between looks at those above this process before the first step.
_LOOK = 0.5


def supervised() -> dict[str, str]:
    """Environment for a command that this process supervises: its ranks stop when this process is gone."""
    pid = os.getpid()
    return {**os.environ, _SUPERVISOR: f"{pid} {processes.started(pid)} {processes.machine()}"}


def _takes_orphans_in(pid: int) -> bool:
    """Return True for the first process of a machine or container, or of a user's session, unless it is a launcher."""
    words = processes.command(pid)
    return (pid == 1 or "".join(words[:1]).endswith("/systemd")) and "deepspeed" not in " ".join(words)


class StopFlag:
    """Set by SIGTERM, SIGINT or SIGUSR1, or when the launcher or supervisor above this process is gone.

    The `deepspeed` command does not pass signals on: killed alone, it leaves launcher and ranks running as orphans.
    So every rank also watches its parent and, if that is DeepSpeed's launcher, its grandparent. (Above torchrun or a
    task of SLURM are shells and daemons, which may end before the run.) A supervisor is found by what it left in the
    environment, however many programs are between. The ranks agree on stopping in the all-reduce that each step makes
    anyway: all stop after the same step and save the same step.

    SIGUSR1 is what schedulers send some time before they end a job: it also asks for the job to be queued again.

    Make one before anything slow is imported, or a launcher that dies during the start is never missed.

    Args:
        launched: whether a launcher started this process.
    """

    def __init__(self, *, launched: bool) -> None:
        self.reason = ""
        self.requeue = False  #: the job is to be queued again
        self.requeue_code = 0  #: exit code of a start that is asked for it; until it is set, the request waits
        self._replaced: dict[int, Any] = {}  # number of a signal -> the handler that was there before
        # Without a launcher (nohup, a shell that ends) there is nobody to miss.
        self._launcher = os.getppid() if launched else 0
        self._runner = processes.parent(self._launcher) if _LAUNCHER in processes.command(self._launcher) else 0
        # Who was killed before this line is not there to be missed: orphans have been taken in by then.
        if launched and "CROSS_RANK" in os.environ and _takes_orphans_in(self._launcher):
            self._launcher = _GONE
        if self._runner and _takes_orphans_in(self._runner):
            self._runner = _GONE
        self._supervisor = os.environ.get(_SUPERVISOR, "")
        self._listening = threading.Event()

    def guard_start(self) -> None:
        """Until `listen`, end this process when the launcher or supervisor is gone: there is nothing to save yet.

        The start of a large model takes minutes, in which nobody looks at the flag. A Ctrl-C, too, ends a launched
        process at once: as an exception it would wait for the other ranks on its way out. SIGUSR1 ends it with
        `requeue_code`; it is kept back for the thread, because a handler would wait for the main thread, which may be
        within a call for minutes: the one that meets the other ranks.
        """
        if self._launcher and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._interrupt_at_start)
        if self._launcher:
            sys.stdout, sys.stderr = self._outliving(sys.stdout), self._outliving(sys.stderr)
        if self._launcher or self._supervisor:
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
            threading.Thread(target=self._end_at_start, name="launcher", daemon=True).start()

    def _outliving(self, stream: TextIO) -> TextIO:
        """The stream, which asks for a stop where its reader is gone: pdsh ends before the ranks are told to, and the
        next line of the progress would be an error instead of a saved step."""
        raw = _Output(stream.fileno(), self)
        unbuffered = isinstance(stream, io.TextIOWrapper) and stream.write_through
        return io.TextIOWrapper(
            raw if unbuffered else io.BufferedWriter(raw),
            encoding=stream.encoding,
            errors=stream.errors,
            line_buffering=bool(stream.line_buffering),
            write_through=unbuffered,
        )

    def _interrupt_at_start(self, number: int, frame: FrameType | None) -> None:
        print("stopped before the first step: signal SIGINT", file=sys.stderr, flush=True)
        os._exit(INTERRUPTED)

    def _end_at_start(self) -> None:
        while not self._listening.wait(_LOOK):
            asked = self.requeue_code != 0 and signal.SIGUSR1 in signal.sigpending()
            if asked or self:
                reason = "signal SIGUSR1" if asked else self.reason
                print(f"stopped before the first step: {reason}", file=sys.stderr, flush=True)
                os._exit(self.requeue_code if asked else LOST_CODE)

    def listen(self) -> None:
        """From now on signals set the flag; before, they end the process as usual: there is nothing to save yet.

        Python hands signals to the main thread only: called in another one, it does nothing.
        """
        self._listening.set()
        if threading.current_thread() is threading.main_thread():
            self._replaced = {number: signal.signal(number, self._handle) for number in SIGNALS}
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])

    def why(self) -> str:
        """Why this rank stops; `reason` is empty where another rank was asked."""
        return self.reason or "asked by another rank"

    def restore(self) -> None:
        """Give the signals back to those who had them before `listen`."""
        for number, handler in self._replaced.items():
            signal.signal(number, handler)
        self._replaced = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.reason and number == signal.SIGINT:  # a second Ctrl-C: the user does not want to wait for the step
            raise KeyboardInterrupt
        # The first one is the reason: to a Ctrl-C the launcher answers with a SIGTERM to its ranks.
        self.reason = self.reason or f"signal {signal.Signals(number).name}"
        self.requeue = self.requeue or number == signal.SIGUSR1

    def __bool__(self) -> bool:
        if not self.reason and self._launcher and self._is_orphan():
            self.reason = "the launcher is gone"
        if not self.reason and self._supervisor and self._is_unsupervised():
            self.reason = "the supervisor is gone"
        return bool(self.reason)

    def _is_orphan(self) -> bool:
        if os.getppid() != self._launcher:
            return True
        return self._runner != 0 and processes.parent(self._launcher) != self._runner

    def _is_unsupervised(self) -> bool:
        pid, born, home = self._supervisor.split(" ", 2)
        return processes.state(int(pid), born, home) == "gone"


class _Output(io.FileIO):
    """Output of a process, whose reader may go."""

    def __init__(self, descriptor: int, stop: StopFlag) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._stop = stop

    def write(self, text: Any) -> int:
        try:
            return super().write(text)
        except BrokenPipeError:
            self._stop.reason = self._stop.reason or "nobody reads the output any more"
            return len(text)
