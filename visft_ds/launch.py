"""The command behind launchers/train.py. Torch and DeepSpeed are imported only when the run can really start."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence

from visft_ds.config import missing_inputs, render_missing, resolve_arguments
from visft_ds.data.store import StoreFailed
from visft_ds.parallel.faults import LOST_PEER, LostRank, RanksDiffer, StopFlag

#: Seconds by which a rank outlives one that has explained its end. DeepSpeed's launcher looks once a second and ends
#: with the code of the first rank that it finds ended, which decides whether a supervisor starts the run again.
_SEEN_FIRST = 1.5


def main(argv: Sequence[str]) -> int:
    """Run the command. Returns the exit code: 0 done or stopped cleanly (`visft.run.requeue_code` after SIGUSR1), 2 for
    what the user can mend (a server of the data that does not answer counts as such), 3 where another rank ended first,
    4 when training diverged."""
    stop = StopFlag(launched="RANK" in os.environ)
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

        return train(config, resume=arguments.resume, command=[sys.argv[0], *argv], stop=stop)
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, StoreFailed) as error:
        # All ranks of a machine run into the same mistake; one message is enough. One that only this rank sees says so.
        first_here = os.environ.get("LOCAL_RANK", str(rank)) == "0"
        if rank == 0 or first_here or getattr(error, "of_one_rank", False):
            print(f"{f'[rank {rank}] ' if rank else ''}error: {error}", file=sys.stderr, flush=True)
        return 2
    except FloatingPointError as error:
        # Training diverged. Where a matcher sees it first, that may be on one rank only.
        if rank == 0 or not getattr(error, "of_all_ranks", False):
            print(f"[rank {rank}] error: {error}", file=sys.stderr, flush=True)
        return 4
    except RanksDiffer as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except RuntimeError as error:
        if not isinstance(error, LostRank) and not LOST_PEER.search(str(error)):
            raise
        # The rank that failed tells why; the traceback of one that only waited for it would bury that.
        told = str(error) if isinstance(error, LostRank) else "another rank ended first"
        print(f"[rank {rank}] stopped: {told}", file=sys.stderr, flush=True)
        if isinstance(error, LostRank) and error.explained:
            time.sleep(_SEEN_FIRST)
        return 3
