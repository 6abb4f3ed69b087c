"""Ten questions about the recipe as experiments; see visft_ds/experiments/ablations/cli.py and docs/evaluation.md."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent  # leaves the path: its profile.py would hide the standard library's
sys.path[:] = [str(HERE.parent), *(path for path in sys.path if Path(path).resolve() != HERE)]

if __name__ == "__main__":  # the processes of steps import this file too, and nothing of it
    from visft_ds.experiments.ablations.cli import main

    sys.exit(main())
