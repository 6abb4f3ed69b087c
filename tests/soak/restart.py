"""Two ranks that train, started again until they end by themselves: `python -m tests.soak.restart WORDS`.

torchrun's `--max-restarts` does the same for users. It starts again after every end but a success; a soak has to see
which ends are the user's to mend, and how many steps each of them costs.
"""

from __future__ import annotations

import sys
import time

from visft_ds.errors import LOST_CODE, NO_ANSWER_CODE
from visft_ds.resilience.processes import start_ranks

#: Exit codes after which the run may go on as it is. 1: a rank was killed in a collective that raises another error.
AGAIN = (1, LOST_CODE, NO_ANSWER_CODE)


def main() -> int:
    """Run `visft WORDS` until the end; returns its exit code."""
    restarts = 0
    while True:
        code = start_ranks(sys.argv[1:], 2)
        if code not in AGAIN:
            return code
        restarts += 1
        print(f"[restart] ended with {code}; restart {restarts}", file=sys.stderr, flush=True)
        time.sleep(0.5)


if __name__ == "__main__":
    sys.exit(main())
