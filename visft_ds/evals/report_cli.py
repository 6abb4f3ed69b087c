"""Flags of `visft report`. What costs seconds to import is imported when the flags are right."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from visft_ds import program
from visft_ds.flags import Parser

USAGE = """A page about one run, or about several side by side: one HTML file that needs no network.

    visft report runs/stage2                                     writes runs/stage2/report.html
    visft report runs/stage1 runs/stage2 --out report.html       the first is what the others are compared with

On it: results with intervals (of visft evaluate, else of the evaluations during training), pictures, losses by task,
learning rates, speed and memory, where the time went, settings and environment. A run may still be training, and what
it has not recorded is left out and named. Exit status: 0 fine, 2 wrong usage or unusable input.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    given = _parser().parse_args(arguments)
    from visft_ds.evals.run_report import report_runs
    from visft_ds.resilience.errors import tell

    try:
        print(f"wrote {report_runs(given.runs, given.out)}")
    except (ValueError, OSError) as error:
        return tell(error, "report")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog=program("report"), description=USAGE, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run of visft train")
    parser.add_argument("--out", type=Path, metavar="FILE", help="name it .html (default, of one run: RUN/report.html)")
    return parser
