"""Box AP, mask AP and caption metrics of models: see `python tools/evaluate.py --help`."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent  # leaves the path: its profile.py would hide the standard library's
sys.path[:] = [str(HERE.parent), *(path for path in sys.path if Path(path).resolve() != HERE)]

from visft_ds.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
