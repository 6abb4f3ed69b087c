"""LoRA adapters and base weights, merged, taken apart or rewritten: see `python tools/merge_lora.py
--help`.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent  # leaves the path: its profile.py would hide the standard library's
sys.path[:] = [str(HERE.parent), *(path for path in sys.path if Path(path).resolve() != HERE)]

from visft_ds.cli import main

if __name__ == "__main__":
    sys.exit(main(["merge", *sys.argv[1:]]))
