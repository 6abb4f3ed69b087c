"""The command behind launchers/train.py. Torch and DeepSpeed are imported only when the run can really start."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence

from visft_ds.config import missing_inputs, render_missing, resolve_arguments
from visft_ds.data.store import StoreFailed

#: What gloo and NCCL say to a rank whose peer is gone.
_LOST_PEER = re.compile(r"Connection (closed|reset) by|remote process exited|Broken pipe|recvValue failed")


def main(argv: Sequence[str]) -> int:
    """Run the command. Returns the exit code: 0 done or stopped cleanly, 2 for what the user can mend (a server of the
    data that does not answer counts as such), 3 where another rank ended first, 4 when training diverged."""
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    try:
        arguments, config = resolve_arguments(argv)
        missing = missing_inputs(config)
        if arguments.dry_run:
            from visft_ds.start_report import print_dry_run

            if rank == 0:
                print_dry_run(config, world_size, render_missing(missing) if missing else "")
            return 0
        if missing:
            raise ValueError(render_missing(missing))
        from visft_ds.train import train

        train(config, resume=arguments.resume, command=[sys.argv[0], *argv])
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, StoreFailed) as error:
        # Every rank runs into the same mistake; one message is enough. One that only this rank sees says so.
        if rank == 0 or getattr(error, "of_one_rank", False):
            print(f"{f'[rank {rank}] ' if rank else ''}error: {error}", file=sys.stderr, flush=True)
        return 2
    except FloatingPointError as error:
        # Training diverged. Where a matcher sees it first, that may be on one rank only.
        print(f"[rank {rank}] error: {error}", file=sys.stderr, flush=True)
        return 4
    except RuntimeError as error:
        if not _LOST_PEER.search(str(error)):
            raise
        # The rank that failed tells why; the traceback of one that only waited for it would bury that.
        print(f"[rank {rank}] stopped: another rank ended first", file=sys.stderr, flush=True)
        return 3
    return 0
