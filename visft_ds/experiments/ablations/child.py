"""The process of one step. Imports little: a fork has everything already, and what starts anew imports its own."""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

_PR_SET_PDEATHSIG = 1  # of Linux, prctl(2)


def run_command(command: Sequence[str], log: Path, forks: bool) -> None:
    """Become a command: everything it says goes into the log, and it leads a process group of its own.

    Args:
        command: `visft` or another program, and its words.
        forks: run `visft` in this very process, with whatever has been imported.
    """
    os.setsid()
    if sys.platform == "linux":  # a comparison that is killed must not leave a training behind
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)
    if command[0] != "visft":
        os.execvp(command[0], [*command])
    if not forks:
        os.execv(sys.executable, [sys.executable, "-m", "visft_ds", *command[1:]])
    sys.argv[:] = command
    runpy.run_module("visft_ds", run_name="__main__")
