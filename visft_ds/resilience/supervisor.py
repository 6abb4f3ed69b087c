"""Starting a run again after it was lost, on one machine: `visft supervise -- visft train --num_gpus 8 --stage 2`.

A crash, a killed or hanging rank and a lost launcher are worth another try from the newest checkpoint. A mistake of
the user (exit code 2), training that diverged (4: a restart would repeat it) and a request to stop are not.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import psutil

from visft_ds import program
from visft_ds.config.cli import resolve_arguments
from visft_ds.flags import Parser, check_least
from visft_ds.resilience import errors
from visft_ds.resilience.processes import without_num_gpus
from visft_ds.resilience.stop import SIGNALS, supervised
from visft_ds.run.folder import ENDED_FILE, named_steps

GAVE_UP = 1
#: Exit codes of a run that a restart would not change: a mistake to mend, diverged, stopped by SIGINT or SIGTERM.
FINAL_CODES = (2, 4, 130, 143)
#: Restarts in a row that may end before anything new is saved.
FRUITLESS = 2
_GRACE = 30.0  #: seconds for what is left of a run to end by itself; launchers grant as much
_EPILOG = """example:
  visft supervise --max-restarts 5 -- visft train --num_gpus 8 --stage 2
A signal to this command is passed on to the run, which saves and ends; no restart follows.
"""


class Supervisor:
    """Runs a training command, and runs it again after losses.

    Args:
        command: a launcher and a training with its flags, or that alone.

    Raises:
        ValueError: a command without a training or that does not exist, or wrong arguments.
    """

    def __init__(self, command: Sequence[str]) -> None:
        arguments, config = resolve_arguments(flags_of_training(command))
        if arguments.resume == "no" or arguments.dry_run:
            raise ValueError("--resume no and --dry-run leave nothing that a restart could continue: leave them out")
        if shutil.which(command[0]) is None:
            raise ValueError(f"{command[0]}: no such command; is its environment active?")
        self.command, self.out = list(command), Path(config.visft.run.out or "")
        self.requeue_code = config.visft.run.requeue_code
        self.stopped = 0  #: the signal that asked for an end
        self._session = 0

    def run(self, max_restarts: int, backoff: float) -> int:
        """Run until the end. Returns the exit code.

        Args:
            max_restarts: attempts after the first one, at most.
            backoff: seconds before a restart; doubled after each attempt that saved nothing new, up to 64 times.
        """
        for number in SIGNALS:
            signal.signal(number, self._pass_on)
        fruitless, saved = 0, named_steps(self.out)
        for attempt in itertools.count(1):
            code = self._attempt()
            if self.stopped or code in (*FINAL_CODES, self.requeue_code) or (code == 0 and self._is_done()):
                return code
            # The newest one does not tell: an attempt that passes a damaged checkpoint over saves steps below that.
            now = named_steps(self.out)
            fruitless, saved = 0 if now - saved else fruitless + 1, now
            ended = f"attempt {attempt} ended with {code}, its newest checkpoint is of step {max(now, default=0)}"
            if fruitless > FRUITLESS or attempt > max_restarts:
                why = f"{fruitless} attempts in a row saved nothing" if fruitless > FRUITLESS else "no restart is left"
                _tell(f"given up: {ended}; {why}")
                break
            seconds = backoff * 2 ** min(fruitless, 6)
            _tell(f"{ended}; restart {attempt} of {max_restarts} in {seconds:g} s")
            until = time.monotonic() + seconds
            while not self.stopped and time.monotonic() < until:
                time.sleep(0.1)
            if self.stopped:
                return self.requeue_code if self.stopped == signal.SIGUSR1 else 128 + self.stopped
        return GAVE_UP

    def _attempt(self) -> int:
        """Run the command once, and wait for everything below it."""
        (self.out / ENDED_FILE).unlink(missing_ok=True)
        process = subprocess.Popen(self.command, start_new_session=True, env=supervised())
        self._session = process.pid
        code = process.wait()
        _, left = psutil.wait_procs(self._processes(), timeout=_GRACE)
        if left:
            _tell(f"ending {len(left)} processes that the run left behind")
        for process_left in left:
            with contextlib.suppress(psutil.Error):
                process_left.kill()
        return code

    def _is_done(self) -> bool:
        """DeepSpeed's launcher also ends with 0 when it lost its child; then the run does not say that it is done."""
        ended = self.out / ENDED_FILE
        return ended.is_file() and ended.read_text(encoding="utf-8").strip() == "done"

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.stopped = number
        processes = self._processes()
        # Launchers die of signals; the ranks save. Below a rank are only its own workers.
        ranks = {process.pid: process for process in processes if "RANK" in process.info["environ"]}
        for process in [rank for rank in ranks.values() if rank.info["ppid"] not in ranks] or processes:
            with contextlib.suppress(psutil.Error):
                process.send_signal(number)

    def _processes(self) -> list[psutil.Process]:
        """Processes of the run's session, apart from those that wait to be collected."""
        found = []
        for process in psutil.process_iter(["status", "ppid", "environ"], ad_value={}):
            with contextlib.suppress(ProcessLookupError):
                if process.info["status"] != psutil.STATUS_ZOMBIE and os.getsid(process.pid) == self._session:
                    found.append(process)
        return found


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
    given = " ".join(command) or "no command"
    raise ValueError(f"{given}: give a training after --, for example visft train --num_gpus 8 --stage 2")


def _tell(text: str) -> None:
    """Write a line to the log of the job."""
    print(f"[supervisor] {text}", file=sys.stderr, flush=True)


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
        check_least(options, max_restarts=0, backoff=0)
        return Supervisor(command).run(options.max_restarts, options.backoff)
    except (ValueError, OSError) as error:
        return errors.tell(error)
