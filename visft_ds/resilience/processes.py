"""Processes of this machine, identified through /proc where there is one; how many a command asks for.

Imports nothing heavy.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from visft_ds import CHECKOUT


@cache
def machine() -> str:
    """The running kernel and the process ids this process sees of it; "" where /proc does not tell.

    Containers of one machine that share its network have one host name and process ids of their own; machines made from
    one image may share a name as well. A process of another one must not count as gone because nobody here has its id.
    """
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def started(pid: int) -> str:
    """When a process was started, as its kernel counts: process ids come again. "" where /proc does not tell."""
    fields = _status(pid)
    return fields[19] if fields else ""


def parent(pid: int) -> int:
    """Parent of a process; -1 where /proc does not tell."""
    fields = _status(pid)
    return int(fields[1]) if fields else -1


def command(pid: int) -> list[str]:
    """Words of a process's command; none where /proc does not tell."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return []


def state(pid: int, born: str, home: str) -> str:
    """The state of a process in words, "gone" where there is no such process, "" where it is unknown.

    Args:
        born: when it was started, as `started` of its own machine told.
        home: that machine, as its `machine` told.
    """
    if not home or home != machine():
        return ""
    fields = _status(pid)
    if not fields or fields[19] != born or fields[0] in "ZX":
        return "gone"
    return {"T": "stopped", "t": "stopped by a debugger", "D": "waiting for a device"}.get(fields[0], "running")


def _status(pid: int) -> list[str]:
    """The fields after its name, the first one its state; none where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return []


def without_num_gpus(words: Sequence[str]) -> tuple[list[str], str | None]:
    """Words of a command without `--num_gpus N` or `--num_gpus=N`, and N: "" where it is missing, None without both."""
    for place, word in enumerate(words):
        flag, equals, number = word.partition("=")
        if flag == "--num_gpus" and equals:
            return [*words[:place], *words[place + 1 :]], number
        if flag == "--num_gpus":
            return [*words[:place], *words[place + 2 :]], "".join(words[place + 1 : place + 2])
    return list(words), None


def same_code() -> dict[str, str]:
    """Environment of a child process that imports the copy of this package which runs here.

    With `python -m` it would first look into the current folder, and a checkout need not be the copy that is installed.
    """
    places = [*([str(CHECKOUT)] if CHECKOUT else []), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(filter(None, places))}
