"""One rank of launchers/train.py whose loss is FACTOR times as large from step FIRST (which counts from 0) on.

RANK=0 WORLD_SIZE=2 ... python -m tests.train.overflow_case FIRST FACTOR ARGUMENTS OF launchers/train.py
"""

from __future__ import annotations

import sys

from tests.train.bad_step_case import disturb
from visft_ds.launch import main

if __name__ == "__main__":
    first, factor = int(sys.argv[1]), float(sys.argv[2])
    disturb(lambda step: factor if step >= first else 1.0)
    sys.exit(main(sys.argv[3:]))
