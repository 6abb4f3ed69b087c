"""Starting a run again after it was lost, on one machine: `visft supervise -- deepspeed ... --stage 2`.

A crash, a killed or hanging rank and a lost launcher are worth another try from the newest checkpoint. A mistake of
the user (exit code 2), training that diverged (4: a restart would repeat it) and a request to stop are not.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil

from visft_ds import program
from visft_ds.config import resolve_arguments
from visft_ds.flags import Parser
from visft_ds.resilience import errors
from visft_ds.resilience.heartbeat import FOLDER, ended_well, last_start
from visft_ds.resilience.processes import without_num_gpus
from visft_ds.resilience.signals import SIGNALS, supervised
from visft_ds.run.folder import named_steps

GAVE_UP = 1
#: Exit codes of a run that a restart would not change: a mistake to mend, diverged, interrupted.
FINAL_CODES = (2, 4, 130)
#: Restarts in a row that may end before anything new is saved.
FRUITLESS = 2
#: Of a process that has ended meanwhile, or is another user's by now.
_NOT_OURS = (psutil.NoSuchProcess, psutil.AccessDenied)
_GRACE = 30.0  #: seconds for what is left of a run to end by itself; launchers grant as much
_EPILOG = """example:
  visft supervise --max-restarts 5 -- deepspeed --num_gpus 8 --module visft_ds.launch --stage 2
A signal to this command stops the run cleanly: each rank gets it, no launcher does, and no restart follows.
"""


@dataclass(frozen=True)
class Attempt:
    """Start of the command, one of several."""

    code: int  #: its exit code; negative for a signal
    seconds: float
    saved: Set[int]  #: steps that had a checkpoint when it ended
    finished: bool  #: the run is done, or somebody asked for an end

    @property
    def newest(self) -> int:
        """The newest saved step; 0 without any."""
        return max(self.saved, default=0)


def supervise(
    run: Callable[[], Attempt],
    *,
    saved: Set[int],
    max_restarts: int,
    backoff: float,
    sleep: Callable[[float], int | None],
) -> int:
    """Run, and run again after losses. Returns the exit code.

    Args:
        run: one attempt.
        saved: steps that have a checkpoint before the first attempt.
        max_restarts: attempts after the first one, at most.
        backoff: seconds before the first restart; doubled after each attempt that saved nothing new, up to 64 times.
        sleep: waits for some seconds; the exit code when asked to stop meanwhile.
    """
    attempts: list[Attempt] = []
    fruitless = 0
    while True:
        attempt = run()
        attempts.append(attempt)
        if attempt.finished or attempt.code in FINAL_CODES:
            return attempt.code
        # The newest one does not tell: an attempt that passes a damaged checkpoint over saves steps below that.
        fruitless = 0 if attempt.saved - saved else fruitless + 1
        saved = attempt.saved
        if len(attempts) > max_restarts:
            return _give_up(f"{max_restarts} restarts were allowed (--max-restarts)", attempts)
        if fruitless > FRUITLESS:
            return _give_up(
                f"{fruitless} attempts in a row ended before they saved anything after step {attempt.newest}", attempts
            )
        seconds = backoff * 2 ** min(fruitless, 6)
        tell(
            f"the run ended with {named(attempt.code)} after {attempt.seconds:.0f} s; restart {len(attempts)} of "
            f"{max_restarts} from step {attempt.newest} in {seconds:g} s"
        )
        if (asked := sleep(seconds)) is not None:
            return asked


def named(code: int) -> str:
    """An exit code in words."""
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def tell(text: str) -> None:
    """Write a line to the log of the job."""
    print(f"[supervisor] {text}", file=sys.stderr, flush=True)


def _give_up(why: str, attempts: Sequence[Attempt]) -> int:
    lines = [
        f"  attempt {number}: {named(attempt.code)} after {attempt.seconds:.0f} s, newest saved step {attempt.newest}"
        for number, attempt in enumerate(attempts, 1)
    ]
    tell("given up: " + why + "\n" + "\n".join(lines))
    return GAVE_UP


class Command:
    """The command that is supervised, and the signals that are meant for it.

    Args:
        command: a launcher and a training with its flags, or that alone.

    Raises:
        ValueError: a command without a training or that does not exist, wrong arguments, or numactl missing.
    """

    def __init__(self, command: Sequence[str]) -> None:
        arguments, config = resolve_arguments(flags_of_training(command))
        if arguments.resume == "no":
            raise ValueError("--resume no: a restart has to go on from a checkpoint; leave it out")
        if arguments.dry_run:
            raise ValueError("--dry-run starts nothing that could be lost: give it to visft train itself")
        check_core_binding(command)
        if shutil.which(command[0]) is None:
            raise ValueError(f"{command[0]}: no such command; is its environment active?")
        self.command = list(command)
        self.out, self.requeue_code = Path(config.visft.run.out or ""), config.visft.run.requeue_code
        self.stopping = self.requeue = False
        self._process: subprocess.Popen[bytes] | None = None

    def listen(self) -> None:
        """Pass signals on from now on."""
        for number in SIGNALS:
            signal.signal(number, self._pass_on)

    def run(self) -> Attempt:
        """Start the command and wait for it and everything below it."""
        began, before = time.monotonic(), last_start(self.out / FOLDER)
        self._process = subprocess.Popen(self.command, start_new_session=True, env=supervised())
        code = self._process.wait()
        self._wait_for_the_rest(self._process.pid)
        # DeepSpeed's launcher also ends with 0 when it lost its child; then the ranks have stopped, but nobody asked.
        good = code == 0 and ended_well(self.out / FOLDER, before)
        asked = self.stopping or code == self.requeue_code != 0
        return Attempt(code, time.monotonic() - began, named_steps(self.out), finished=good or asked)

    def sleep(self, seconds: float) -> int | None:
        """Wait; an exit code as soon as somebody asks for an end."""
        until = time.monotonic() + seconds
        while not self.stopping and time.monotonic() < until:
            time.sleep(0.1)
        if not self.stopping:
            return None
        return self.requeue_code if self.requeue else 0

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.stopping, self.requeue = True, self.requeue or number == signal.SIGUSR1
        if self._process is not None:
            for rank in _ranks(self._process.pid):
                with contextlib.suppress(*_NOT_OURS):
                    rank.send_signal(number)

    def _wait_for_the_rest(self, session: int) -> None:
        """End ranks that did not end by themselves when their launcher was gone."""
        until, told = time.monotonic() + _GRACE, False
        while left := _session(session):
            if time.monotonic() > until:
                if not told:
                    tell(f"ending {len(left)} processes that the run left behind")
                told = True
                for process in left:
                    with contextlib.suppress(*_NOT_OURS):
                        process.kill()
            time.sleep(0.2)


def flags_of_training(command: Sequence[str]) -> Sequence[str]:
    """Words after `visft train`, `--module visft_ds.launch` or launchers/train.py.

    Raises:
        ValueError: none of them is in the command.
    """
    for place, word in enumerate(command):
        if word == "visft_ds.launch" or Path(word).name == "train.py":
            return command[place + 1 :]
        if Path(word).name in ("visft", "visft_ds") and command[place + 1 : place + 2] == ["train"]:
            return without_num_gpus(command[place + 2 :])[0]
    raise ValueError(
        f"{' '.join(command) or 'no command'}: give a training after --, for example deepspeed --num_gpus 8 --module "
        "visft_ds.launch --stage 2"
    )


def check_core_binding(command: Sequence[str]) -> None:
    """DeepSpeed's launcher binds cores with a tool that few machines have, and says so with a traceback.

    Raises:
        ValueError: the tool is asked for and missing.
    """
    if "--bind_cores_to_rank" in command and shutil.which("numactl") is None:
        raise ValueError(
            "--bind_cores_to_rank needs numactl, which is not installed: apt install numactl, or leave it out"
        )


def _session(session: int) -> list[psutil.Process]:
    """Processes of a session, apart from those that wait to be collected."""
    found = []
    for process in psutil.process_iter(["pid", "status"]):
        try:
            if os.getsid(process.pid) == session and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process)
        except ProcessLookupError:
            continue
    return found


def _ranks(session: int) -> list[psutil.Process]:
    """The training processes of a session: the topmost with a rank, or all where no launcher gave any."""
    ranked = {}
    for process in _session(session):
        with contextlib.suppress(*_NOT_OURS):
            if "RANK" in process.environ():
                ranked[process.pid] = process, process.ppid()
    return [process for process, parent in ranked.values() if parent not in ranked] or _session(session)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns its exit code, 1 after giving up, 2 for what the user can mend."""
    parser = Parser(
        prog=program("supervise"),
        description="Run a training command and start it again after it was lost.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--max-restarts", type=int, default=3, metavar="N", help="restarts in all (3)")
    parser.add_argument("--backoff", type=float, default=10.0, metavar="SECONDS", help="before the first restart (10)")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND")
    options = parser.parse_args(arguments)
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    try:
        if options.max_restarts < 0 or options.backoff < 0:
            raise ValueError("--max-restarts and --backoff must not be negative")
        supervised = Command(command)
    except (ValueError, OSError) as error:
        return errors.tell(error)
    supervised.listen()
    return supervise(
        supervised.run,
        saved=named_steps(supervised.out),
        max_restarts=options.max_restarts,
        backoff=options.backoff,
        sleep=supervised.sleep,
    )
