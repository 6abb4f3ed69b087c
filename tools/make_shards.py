"""COCO -> shards that any WebDataset reader opens: `visft shards` from a checkout."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent  # leaves the path: its profile.py would hide the standard library's
sys.path[:] = [str(HERE.parent), *(path for path in sys.path if Path(path).resolve() != HERE)]

from visft_ds.cli import main

if __name__ == "__main__":
    sys.exit(main(["shards", *sys.argv[1:]]))
