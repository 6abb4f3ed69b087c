"""Train a stage: `deepspeed --num_gpus 8 launchers/train.py --stage 2`. One process alone works too (no
launcher).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the launcher puts only launchers/ on the path

from visft_ds.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
