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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil

from visft_ds import program
from visft_ds.config import resolve_arguments
from visft_ds.flags import Parser
from visft_ds.redaction import redacted
from visft_ds.resilience.heartbeat import FOLDER, asked_to_stop
from visft_ds.resilience.signals import SIGNALS, supervised
from visft_ds.run.folder import newest_step

GAVE_UP = 1
#: Exit codes of a run that a restart would not change: a mistake to mend, diverged, interrupted.
FINAL_CODES = (2, 4, 130)
#: Restarts in a row that may end before anything new is saved.
FRUITLESS = 2
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
    step: int  #: the newest saved one when it ended
    finished: bool  #: all steps are done, or somebody asked for an end


def supervise(
    run: Callable[[], Attempt], *, saved: int, max_restarts: int, backoff: float, sleep: Callable[[float], bool]
) -> int:
    """Run, and run again after losses. Returns the exit code.

    Args:
        run: one attempt.
        saved: newest step that is saved before the first attempt.
        max_restarts: attempts after the first one, at most.
        backoff: seconds before the first restart; doubled after each attempt that saved nothing new, up to 64 times.
        sleep: waits for some seconds; True when asked to stop meanwhile.
    """
    attempts: list[Attempt] = []
    fruitless = 0
    while True:
        attempt = run()
        attempts.append(attempt)
        if attempt.finished or attempt.code in FINAL_CODES:
            return attempt.code
        fruitless = 0 if attempt.step > saved else fruitless + 1
        saved = max(saved, attempt.step)
        if len(attempts) > max_restarts:
            return _give_up(f"{max_restarts} restarts were allowed (--max-restarts)", attempts)
        if fruitless > FRUITLESS:
            return _give_up(
                f"{fruitless} attempts in a row ended before they saved anything after step {saved}", attempts
            )
        seconds = backoff * 2 ** min(fruitless, 6)
        tell(
            f"the run ended with {named(attempt.code)} after {attempt.seconds:.0f} s; restart {len(attempts)} of "
            f"{max_restarts} from step {saved} in {seconds:g} s"
        )
        if sleep(seconds):
            return 0


def named(code: int) -> str:
    """An exit code in words."""
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def tell(text: str) -> None:
    """Write a line to the log of the job."""
    print(f"[supervisor] {text}", file=sys.stderr, flush=True)


def _give_up(why: str, attempts: Sequence[Attempt]) -> int:
    lines = [
        f"  attempt {number}: {named(attempt.code)} after {attempt.seconds:.0f} s, newest saved step {attempt.step}"
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
        check_core_binding(command)
        if shutil.which(command[0]) is None:
            raise ValueError(f"{command[0]}: no such command; is its environment active?")
        self.command = list(command)
        self.out, self.total_steps = Path(config.visft.run.out or ""), config.total_steps
        self.requeue_code = config.visft.run.requeue_code
        self.stopping = False
        self._process: subprocess.Popen[bytes] | None = None

    def listen(self) -> None:
        """Pass signals on from now on."""
        for number in SIGNALS:
            signal.signal(number, self._pass_on)

    def run(self) -> Attempt:
        """Start the command and wait for it and everything below it."""
        began = time.monotonic()
        self._process = subprocess.Popen(self.command, start_new_session=True, env=supervised())
        code = self._process.wait()
        self._wait_for_the_rest(self._process.pid)
        step = newest_step(self.out)
        # DeepSpeed's launcher also ends with 0 when it lost its child; then the ranks have stopped, but nobody asked.
        good = code == 0 and (step >= self.total_steps or asked_to_stop(self.out / FOLDER))
        asked = self.stopping or code == self.requeue_code != 0
        return Attempt(code, time.monotonic() - began, step, finished=good or asked)

    def sleep(self, seconds: float) -> bool:
        """Wait; True as soon as somebody asks for an end."""
        until = time.monotonic() + seconds
        while not self.stopping and time.monotonic() < until:
            time.sleep(0.1)
        return self.stopping

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.stopping = True
        if self._process is not None:
            for rank in _ranks(self._process.pid):
                rank.send_signal(number)

    def _wait_for_the_rest(self, session: int) -> None:
        """End ranks that did not end by themselves when their launcher was gone."""
        until = time.monotonic() + _GRACE
        while left := _session(session):
            if time.monotonic() > until:
                tell(f"ending {len(left)} processes that the run left behind")
                for process in left:
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
            flags = list(command[place + 2 :])
            if "--num_gpus" in flags:  # the command's own, see cli.py
                number = flags.index("--num_gpus")
                del flags[number : number + 2]
            return flags
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
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if "RANK" in process.environ():
                ranked[process.pid] = process
    return [process for process in ranked.values() if process.ppid() not in ranked] or _session(session)


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
        print(f"error: {redacted(error)}", file=sys.stderr, flush=True)
        return 2
    supervised.listen()
    return supervise(
        supervised.run,
        saved=newest_step(supervised.out),
        max_restarts=options.max_restarts,
        backoff=options.backoff,
        sleep=supervised.sleep,
    )
