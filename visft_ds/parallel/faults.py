"""Stopping cleanly: signals and a lost launcher become one flag that all ranks read at the step boundary.

Imports nothing heavy, so that what it offers is there before torch is.
"""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
#: What gloo and NCCL say to a rank whose peer is gone.
LOST_PEER = re.compile(r"Connection (closed|reset) by|remote process exited|Broken pipe|recvValue failed")


class RanksDiffer(RuntimeError):
    """Ranks that ought to have or do the same do not; every rank knows and stops."""


class LostRank(RuntimeError):
    """Another rank died or ended with an error; this one cannot go on.

    Args:
        told: what happened, as far as this rank knows.
        explained: the other one has said itself why it ended.
    """

    def __init__(self, told: str, *, explained: bool) -> None:
        super().__init__(told)
        self.explained = explained


class StopFlag:
    """Set by SIGTERM, SIGINT or SIGUSR1, or when the launcher above this process is gone.

    The `deepspeed` command does not pass signals on: killed alone, it leaves launcher and ranks running as orphans.
    So every rank also watches its parent and grandparent. The ranks agree on stopping in the all-reduce that each step
    makes anyway: all stop after the same step and save the same step.

    SIGUSR1 is what schedulers send some time before they end a job: it also asks for the job to be queued again.

    Make one before anything slow is imported, or a launcher that dies during the start is never missed.

    Args:
        launched: whether a launcher started this process.
    """

    def __init__(self, *, launched: bool) -> None:
        self.reason = ""
        self.requeue = False  #: the job is to be queued again
        # Without a launcher (nohup, a shell that ends) there is nobody to miss.
        self._launcher = os.getppid() if launched else 0
        self._runner = _parent(self._launcher)

    def listen(self) -> None:
        """From now on signals set the flag; before, they end the process as usual: there is nothing to save yet."""
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.reason and number == signal.SIGINT:  # a second Ctrl-C: the user does not want to wait for the step
            raise KeyboardInterrupt
        self.reason = f"signal {signal.Signals(number).name}"
        self.requeue = self.requeue or number == signal.SIGUSR1

    def __bool__(self) -> bool:
        if (
            not self.reason
            and self._launcher
            and (os.getppid() != self._launcher or _parent(self._launcher) != self._runner)
        ):
            self.reason = "the launcher is gone"
        return bool(self.reason)


def _parent(pid: int) -> int:
    """Parent of a process; -1 where /proc does not tell."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except OSError:
        return -1
