"""The process of one step. Imports little: a fork has everything already, and what starts anew imports its own."""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

#: Commands name scripts as a person does who stands in the root of the repository.
ROOT = Path(__file__).resolve().parents[3]
_PR_SET_PDEATHSIG = 1  # of Linux, prctl(2)


def run_command(command: Sequence[str], log: Path, forks: bool) -> None:
    """Become a command: everything it says goes into the log, and it leads a process group of its own.

    Args:
        command: a Python script of ours or a program, and its words.
        forks: run a Python script in this very process, with whatever has been imported.
    """
    os.setsid()
    if sys.platform == "linux":  # a comparison that is killed must not leave a training behind
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)
    words = [str(ROOT / word) if word.endswith(".py") and (ROOT / word).is_file() else word for word in command]
    if not words[0].endswith(".py"):
        os.execvp(words[0], words)
    if not forks:
        os.execv(sys.executable, [sys.executable, *words])
    sys.argv[:] = words
    runpy.run_path(words[0], run_name="__main__")
