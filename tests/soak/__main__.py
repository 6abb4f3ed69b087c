"""A soak: a run that is killed, signalled, starved and damaged for half an hour ends as the undisturbed one.

    python -m tests.soak --minutes 30 --seed 0 --out FOLDER --json report.json

Stage 2 of a tiny model on two processes, all three tasks, with evaluation beside it. The exit code is 1 where anything
is different, or where the run does not do after a fault what it promises.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from tests.soak.soak import Plan, Report, soak
from tests.soak.trial import SoakFailed


def main() -> int:
    """Parse, soak, report. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0, help="how long all of it is to take, about (30)")
    parser.add_argument("--seed", type=int, default=0, help="of the schedule of faults (0)")
    parser.add_argument("--steps", type=int, help="length of the run, instead of --minutes")
    parser.add_argument("--gap", type=int, default=100, help="steps between two faults, in the mean (100)")
    parser.add_argument("--out", type=Path, help="a new folder that stays; by default a temporary one that does not")
    parser.add_argument("--json", type=Path, help="write the report there as well")
    options = parser.parse_args()
    # A job in the background of a shell ignores it, and so would every process that is started here.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    out = options.out or Path(tempfile.mkdtemp(prefix="soak-"))
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        parser.error(f"--out {out} is not empty")
    try:
        report = soak(out, Plan(options.seed, options.gap, options.minutes, options.steps))
    except SoakFailed as error:  # before anything was disturbed
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        if options.out is None:
            shutil.rmtree(out)
    print(as_text(report))
    if options.json:
        options.json.write_text(json.dumps(asdict(report), indent=1) + "\n", encoding="utf-8")
    return int(bool(report.differences))


def as_text(report: Report) -> str:
    """The report as a table of faults and a summary."""
    rows = [("at", "step", "fault", "restarted by", "steps lost", "back after", "")]
    rows += [
        (f"{one.at:.0f} s", str(one.step), one.kind, one.restarted_by, str(one.lost), f"{one.seconds:.0f} s", one.note)
        for one in report.faults
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    lines = ["  ".join([*(cell.ljust(widths[i]) for i, cell in enumerate(row[:6])), row[6]]).rstrip() for row in rows]
    lost = sum(report.lost)
    lines += [
        "",
        f"{len(report.faults)} faults of {len({one.kind for one in report.faults})} kinds in {report.total_steps} "
        f"steps, seed {report.seed}; {report.minutes:.1f} minutes in all",
        f"restarts: {report.restarts} by the supervisor, {report.starts - 1} by hand where it does not by design",
        f"steps lost and made again: {lost} ({100 * lost / report.total_steps:.1f} %)",
        f"undisturbed run {report.reference_seconds:.0f} s, disturbed run {report.seconds:.0f} s",
    ]
    lines += [f"DIFFERENT: {one}" for one in report.differences] or ["the same, bit for bit, as the undisturbed run"]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
