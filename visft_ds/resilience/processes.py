"""The ranks of a command on this machine, as `visft COMMAND --num_gpus N` starts them. Imports nothing heavy.

DeepSpeed's launcher ends with 0 when it was killed, and a Ctrl-C ends it with a traceback while ranks still
save.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

from visft_ds import CHECKOUT
from visft_ds.errors import LOST_CODE, NO_ANSWER_CODE, RankError
from visft_ds.resilience.stop import SIGNALS

#: Exit codes of a rank that the others need not wait for; those above are of a stop, after which ranks still
#: save.
_FAILED = frozenset(range(-64, NO_ANSWER_CODE + 1)) - {0}
#: What a launcher tells each of its ranks -> what holds without one.
_LAUNCHERS = {
    "RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_RANK": "0",
    "MASTER_PORT": "0",
    "LOCAL_SIZE": "1",  # of DeepSpeed
    "LOCAL_WORLD_SIZE": "1",  # of torchrun
}
#: Seconds that ranks have to end by themselves after one has failed.
_GRACE = 15.0


def check_environment() -> None:
    """Raise ValueError for variables of the environment as no launcher sets them, by their names."""
    variables = {name: os.environ.get(name, default) for name, default in _LAUNCHERS.items()}
    wrong = {name: text for name, text in variables.items() if not _is_count(text)}
    if not wrong and int(variables["RANK"]) >= int(variables["WORLD_SIZE"]):
        wrong = {name: variables[name] for name in ("RANK", "WORLD_SIZE")}
    if wrong:
        values = ", ".join(f"{name}={text}" for name, text in wrong.items())
        raise RankError(f"{values}: no launcher sets this; unset {' and '.join(wrong)}")


def _is_count(text: str) -> bool:
    """Return True for 0, 1, 2, ... in the digits that C reads, too."""
    return text.isascii() and text.isdecimal()


def without_num_gpus(words: Sequence[str]) -> tuple[list[str], int | None]:
    """Words of a command without `--num_gpus N` or `--num-gpus=N`, and N; None without it.

    Raises ValueError for another number, and as `check_environment`.
    """
    check_environment()
    rest: list[str] = []
    remaining = iter(words)
    for word in remaining:
        flag, equals, number = word.partition("=")
        if flag not in ("--num_gpus", "--num-gpus"):
            rest.append(word)
            continue
        if not equals:
            number = next(remaining, "")
        if not _is_count(number) or int(number) == 0:
            raise ValueError(f"{f'{flag} {number}'.strip()}: give the number of processes, one for each GPU")
        return [*rest, *remaining], int(number)
    return rest, None


def start_ranks(words: Sequence[str], count: int) -> int:
    """Run `visft WORDS` in `count` processes that train or evaluate together. Returns their common exit
    status.

    A signal is passed on to each rank once: the ranks are no part of the terminal's foreground group. A rank
    that fails ends the others, which get some seconds to say why.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = os.environ.get("MASTER_PORT") or str(free.getsockname()[1])
    shared = {
        "WORLD_SIZE": str(count),
        "LOCAL_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    command = [sys.executable, "-m", "visft_ds", *words]
    ranks: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        for process in ranks:
            process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in SIGNALS}
    # A Ctrl-C waits until a rank handles it (`visft_ds.cli.main`): an interpreter that starts would print a
    # traceback.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        for rank in range(count):
            environment = {**same_code(), **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(subprocess.Popen(command, env=environment, process_group=0))
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        ended = _wait_for(ranks)
    finally:
        for process in ranks:  # none is left behind where a later one could not start
            if process.poll() is None:
                process.kill()
                process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    return _status_of([process.returncode for process in ranks if process not in ended])


def _wait_for(ranks: Sequence[subprocess.Popen[bytes]]) -> list[subprocess.Popen[bytes]]:
    """Wait for the end of all ranks; returns those that were ended here, some seconds after another one had
    failed.
    """
    deadline: float | None = None
    ended: list[subprocess.Popen[bytes]] = []
    while None in [process.poll() for process in ranks]:  # each of them, or a later rank's end is never seen
        if deadline is None and any(process.returncode in _FAILED for process in ranks):
            # Nobody wants to wait after a Ctrl-C, and a rank that it ends, rather than stops, saves nothing.
            interrupted = any(process.returncode == -signal.SIGINT for process in ranks)
            deadline = time.monotonic() + (1.0 if interrupted else _GRACE)
        if deadline is not None and time.monotonic() > deadline:
            if not ended:
                ended = [process for process in ranks if process.returncode is None]
            for process in ended:
                process.kill()
        time.sleep(0.1)
    return ended


def _status_of(codes: Sequence[int]) -> int:
    """Exit status of all ranks together: that of the rank which failed by itself, not of those that only lost
    it.
    """
    for code in codes:
        if code < 0 and code != -signal.SIGINT:  # who sent that knows it
            print(f"a process was ended by signal {signal.Signals(-code).name}", file=sys.stderr, flush=True)
    for code in codes:
        if code > 0 and code != LOST_CODE:
            return code
    for code in codes:
        if -code in SIGNALS:  # before the first step these end a rank as they end any process
            return 128 - code
    return LOST_CODE if any(codes) else 0


def same_code() -> dict[str, str]:
    """Environment of a child process that imports the copy of this package which runs here.

    With `python -m` it would first look into the current folder, and a checkout need not be the copy that is
    installed.
    """
    folders = [os.environ.get("PYTHONPATH", "")]
    if CHECKOUT is not None:
        folders.insert(0, str(CHECKOUT))
    return {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(filter(None, folders))}
