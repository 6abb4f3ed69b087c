"""Is this machine ready to train? One line for each check, with what to do where it is not.

    python tools/doctor.py
    python tools/doctor.py --model eva_e --folder /data/runs

Exit status: 0 ready (warnings included), 1 there is a problem, 2 wrong usage.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent  # leaves the path: its profile.py would hide the standard library's
sys.path[:] = [str(HERE.parent), *(path for path in sys.path if Path(path).resolve() != HERE)]

import argparse
from collections.abc import Sequence
from pathlib import Path

from visft_ds.doctor import MODELS, OK, PROBLEM, WARNING, Purpose, examine
from visft_ds.monitor.console import Section, print_plan


def main(arguments: Sequence[str] | None = None) -> int:
    """Run every check; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        findings = list(examine(Purpose(options.folder, options.model, options.port)))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    order = (PROBLEM, WARNING, OK)
    rows = [finding.row() for status in order for finding in findings if finding.status == status]
    counts = {status: sum(finding.status == status for finding in findings) for status in order}
    verdict = "not ready" if counts[PROBLEM] else "ready"
    title = f"this machine is {verdict}: {counts[PROBLEM]} problems, {counts[WARNING]} warnings, {counts[OK]} ok"
    print_plan(title, [Section("checks", rows)])
    return 1 if counts[PROBLEM] else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tools/doctor.py", description="Is this machine ready to train?")
    parser.add_argument(
        "--model", metavar="NAME", help=f"what is to be trained: {', '.join(MODELS)} (default: anything)"
    )
    parser.add_argument("--folder", type=Path, default=Path("."), metavar="DIR", help="where runs will be written (.)")
    parser.add_argument("--port", type=int, default=29500, metavar="N", help="where processes meet (%(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
