"""A soak: a run that is killed, signalled, starved and damaged for half an hour ends as the undisturbed one.

    python -m tests.soak --out FOLDER --seed 0

Stage 2 of a tiny model on two processes, all three tasks, with evaluation beside it. The exit code is 1 where
anything is different, or where the run does not do after a fault what it promises.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from tests.soak.soak import Report, soak
from tests.soak.trial import SoakFailed


def main() -> int:
    """Parse, soak, report. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.soak", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="a new folder for data, runs and logs")
    parser.add_argument("--seed", type=int, default=0, help="of the schedule of faults (0)")
    parser.add_argument(
        "--steps", type=int, default=5400, help="length of the run (5400: half an hour, about)"
    )
    options = parser.parse_args()
    # A job in the background of a shell ignores it, and so would every process that is started here.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    options.out.mkdir(parents=True)
    try:
        report = soak(options.out, seed=options.seed, gap=100, steps=options.steps)
    except SoakFailed as error:  # before anything was disturbed
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(as_text(report))
    return int(bool(report.differences))


def as_text(report: Report) -> str:
    """The report as a table of faults and a summary."""
    lines = [f"{'at':>7} {'step':>6}  {'fault':34} {'restarted':12} {'lost':>5} {'back after':>10}"]
    lines += [
        f"{fault.at:5.0f} s {fault.step:6}  {fault.kind:34} {fault.by:12} {fault.lost:5} {fault.seconds:8.0f} s  {fault.note}"
        for fault in report.faults
    ]
    lines += [
        "",
        f"{len(report.faults)} faults in {report.total_steps} steps",
        f"restarts: {report.restarts} by itself, {report.starts - 1} by hand where it does not by design",
        f"steps lost and made again: {sum(fault.lost for fault in report.faults)}",
        f"undisturbed run {report.reference_seconds:.0f} s, disturbed run {report.seconds:.0f} s",
    ]
    lines += [f"DIFFERENT: {difference}" for difference in report.differences] or [
        "the same, bit for bit, as the undisturbed run"
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
