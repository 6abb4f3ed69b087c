"""Restarts of a lost run, on one machine: `visft supervise -- visft train --num_gpus 8 --stage 2`.

A crash, a killed or hanging rank and a server or disk that does not answer (5) are worth another try from the
newest checkpoint. A mistake of the user (2), training that diverged (4: a restart would repeat it) and a
request to stop are not.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path

from visft_ds import program
from visft_ds.config.flags import build_parser, merge_arguments
from visft_ds.config.resolve import Draft
from visft_ds.errors import tell
from visft_ds.flags import Parser, check_least
from visft_ds.resilience.processes import start_ranks, without_num_gpus
from visft_ds.run_files import named_steps

GAVE_UP = 1
#: Exit codes of a run that a restart would not change: done, a mistake to fix, diverged, stopped by SIGINT or
#: SIGTERM.
FINAL_CODES = (0, 2, 4, 130, 143)
#: Restarts in a row that may end before anything new is saved.
FRUITLESS = 2


def supervise(
    words: Sequence[str], count: int, out: Path, final: Collection[int], max_restarts: int, backoff: float
) -> int:
    """Run `visft WORDS` until the end. Returns the exit code.

    Args:
        count: of its ranks.
        out: the run folder.
        final: exit codes after which there is no restart.
        max_restarts: attempts after the first one, at most.
        backoff: seconds before a restart; doubled after each attempt that saved nothing new, up to 64 times.
    """
    fruitless, saved = 0, named_steps(out)
    for attempt in itertools.count(1):
        code = start_ranks(words, count)
        if code in final:
            return code
        # The newest one does not tell: an attempt that passes a damaged checkpoint over saves steps below
        # that.
        now = named_steps(out)
        fruitless, saved = 0 if now - saved else fruitless + 1, now
        ended = f"attempt {attempt} ended with {code}, its newest checkpoint is of step {max(now, default=0)}"
        if fruitless > FRUITLESS or attempt > max_restarts:
            why = (
                f"{fruitless} attempts in a row saved nothing"
                if fruitless > FRUITLESS
                else "no restart is left"
            )
            print(f"[supervisor] given up: {ended}; {why}", file=sys.stderr, flush=True)
            break
        seconds = backoff * 2 ** min(fruitless, 6)
        restart = f"restart {attempt} of {max_restarts} in {seconds:g} s"
        print(f"[supervisor] {ended}; {restart}", file=sys.stderr, flush=True)
        time.sleep(seconds)
    return GAVE_UP


def flags_of_training(command: Sequence[str]) -> Sequence[str]:
    """Words after `visft train`. Raises ValueError for another command."""
    for place, word in enumerate(command):
        if Path(word).name in ("visft", "visft_ds") and command[place + 1 : place + 2] == ["train"]:
            return command[place + 2 :]
    given = " ".join(command) or "no command"
    raise ValueError(
        f"{given}: give a training command after --, for example visft train --num_gpus 8 --stage 2"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns its exit code, 1 after giving up, 2 for what the user can fix."""
    parser = Parser(
        prog=program("supervise"),
        description="Run a training and restart it if it is lost: visft supervise -- visft train --num_gpus 8 ... "
        "A signal is passed on to the run, which saves and ends without a restart.",
        allow_abbrev=False,
    )
    parser.add_argument("--max-restarts", type=int, default=3, metavar="N", help="restarts at most (3)")
    parser.add_argument(
        "--backoff", type=float, default=10.0, metavar="SECONDS", help="delay of the first restart (10)"
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- visft train ...")
    options = parser.parse_args(arguments)
    try:
        check_least(options, max_restarts=0, backoff=0)
        words, count = without_num_gpus(flags_of_training(options.command))
        training = build_parser().parse_args(words)
        config = Draft(merge_arguments(training).tree).config()
        if training.resume == "no" or training.dry_run:
            raise ValueError(
                "--resume no and --dry-run leave nothing that a restart could continue: leave them out"
            )
        run = config.visft.run
        final, limits = {*FINAL_CODES, run.requeue_code}, (options.max_restarts, options.backoff)
        return supervise(["train", *words], count or 1, Path(run.out or ""), final, *limits)
    except (ValueError, OSError) as error:
        return tell(error)
