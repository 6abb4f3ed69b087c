import sys, os.path as o; sys.path[:] = [o.dirname(o.dirname(o.realpath(__file__)))] + [p for p in sys.path if o.realpath(p) != o.dirname(o.realpath(__file__))]  # noqa: E401, E501, E702, I001  # fmt: skip
"""Repeat a step that was refused, and say which module and which image make the first number that is none.

    python tools/replay.py runs/stage2-eva_e --step 123

Exit status: 0 nothing came up again, 1 something is not finite, 2 unusable input.
"""

from visft_ds.resilience.nan_debug import main

if __name__ == "__main__":
    sys.exit(main())
