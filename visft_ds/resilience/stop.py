"""Stopping cleanly: a signal, or a launcher that is gone, sets one flag that ranks read before each step.

Imports nothing heavy: it is made before torch is imported, so that a launcher that dies during the start is
missed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from enum import IntEnum
from types import FrameType
from typing import Any

import psutil

from visft_ds.errors import LOST_CODE

#: The program between the `deepspeed` command and the ranks of a machine.
_LAUNCHER = "deepspeed.launcher.launch"


class Stop(IntEnum):
    """Reason why a run stops before its end; of several reasons the largest counts."""

    NOT = 0
    LAUNCHER_GONE = 1
    SIGPIPE = 2  #: nobody reads the output any more
    SIGINT = 3
    SIGTERM = 4
    SIGUSR1 = 5  #: schedulers send it before they end a job: it is to be queued again

    def status(self, requeue_code: int) -> int:
        """The exit status of a run that stopped for this reason."""
        if self is Stop.SIGUSR1:
            return requeue_code
        if self > Stop.LAUNCHER_GONE:
            return 128 + signal.Signals[self.name]
        return LOST_CODE if self else 0


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
#: Ends of the names of files that no Ctrl-C may interrupt: of the import of a module libraries make an error
#: of their own, or torch, which imports from C++, aborts; pydantic does likewise when it builds a class.
_TO_THE_END = ("<frozen importlib._bootstrap>", "_model_construction.py")


class SecondInterrupt(KeyboardInterrupt):
    """A second Ctrl-C, for which a run does not finish its step; a save that is on its way is finished."""


def interrupt(
    number: int, frame: FrameType | None, kind: type[KeyboardInterrupt] = KeyboardInterrupt
) -> None:
    """Handle a Ctrl-C: raises KeyboardInterrupt, after the imports that go on."""
    while frame is not None:
        if frame.f_code.co_filename.endswith(_TO_THE_END):
            again = threading.Timer(0.05, os.kill, (os.getpid(), number))
            again.daemon = True
            again.start()
            return
        frame = frame.f_back
    raise kind


class StopFlag:
    """Flag that SIGTERM, SIGINT or SIGUSR1 sets, or the end of the launcher above this process.

    The `deepspeed` command does not pass signals on: killed alone, it leaves launcher and ranks running as
    orphans. So a rank watches its parent and, if that is DeepSpeed's launcher, its grandparent. The ranks
    agree on stopping in the all-reduce that each step makes anyway: all stop after the same step and save the
    same step.

    Args:
        launched: whether a launcher started this process.
    """

    def __init__(self, *, launched: bool) -> None:
        self.reason = Stop.NOT
        self._replaced: dict[int, Any] = {}  # number of a signal -> the handler that was there before
        self._listening = threading.Event()
        self._above: list[psutil.Process] = []
        with contextlib.suppress(psutil.Error):
            if launched:
                self._above.append(launcher := psutil.Process(os.getppid()))
                if _LAUNCHER in launcher.cmdline():
                    self._above.append(psutil.Process(launcher.ppid()))
        if self._above:
            threading.Thread(target=self._end_at_start, name="launcher", daemon=True).start()

    def _end_at_start(self) -> None:
        """End with the launcher at once: until `listen` there is nothing to save."""
        while not self._listening.wait(0.5):
            if self._alone():
                print("stopped before the first step: the launcher is gone", file=sys.stderr, flush=True)
                os._exit(LOST_CODE)

    def listen(self) -> None:
        """Let signals set the flag. Before, they end the process as usual: there is nothing to save yet.

        Python hands signals to the main thread only: called in another one, it does nothing.
        """
        self._listening.set()
        if threading.current_thread() is threading.main_thread():
            self._replaced = {number: signal.signal(number, self._handle) for number in SIGNALS}

    def restore(self) -> None:
        """Restore the signal handlers that were there before `listen`."""
        self._listening.set()
        for number, handler in self._replaced.items():
            signal.signal(number, handler)
        self._replaced = {}

    def output_gone(self) -> None:
        """Discard further output, which nobody reads, and stop after the step."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in (1, 2):
            os.dup2(nowhere, descriptor)
        os.close(nowhere)
        self.reason = max(self.reason, Stop.SIGPIPE)

    def why(self) -> str:
        """Reason why this rank stops, for a message."""
        if self.reason is Stop.LAUNCHER_GONE:
            return "the launcher is gone"
        return f"signal {self.reason.name}" if self.reason else "asked by another rank"

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.reason is Stop.SIGINT and number == signal.SIGINT:
            interrupt(number, frame, SecondInterrupt)  # the user does not want to wait for the step
        self.reason = max(self.reason, Stop[signal.Signals(number).name])

    def __bool__(self) -> bool:
        if not self.reason and self._above and self._alone():
            self.reason = Stop.LAUNCHER_GONE
        return bool(self.reason)

    def _alone(self) -> bool:
        """Return True if a process above has ended, collected or not."""
        with contextlib.suppress(psutil.Error):
            return any(_is_gone(process) for process in self._above)
        return True


def _is_gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
