"""Start a run again after it was lost: `python launchers/supervise.py -- visft train --stage 2`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as launchers/train.py

from visft_ds.cli import main

if __name__ == "__main__":
    sys.exit(main(["supervise", *sys.argv[1:]]))
