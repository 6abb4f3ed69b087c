"""Training of a stage, `visft train`: `deepspeed --num_gpus 8 --module visft_ds.launch --stage 2`.

Torch and DeepSpeed are imported only when the run can really start.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from visft_ds import program
from visft_ds.config import missing_inputs, render_missing, resolve_arguments
from visft_ds.data.store import StoreFailed
from visft_ds.resilience.heartbeat import exit_code
from visft_ds.resilience.signals import LOST_PEER, LostRank, RanksDiffer, StopFlag, is_told_here


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit code: 0 done or stopped cleanly (`visft.run.requeue_code` after SIGUSR1), else
    as `exit_code`; 3 where another rank was killed or hangs, and after a dry run of what could not start."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    stop = StopFlag(launched="RANK" in os.environ)
    stop.guard_start()
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    try:
        options, config = resolve_arguments(words)
        from visft_ds.prepare.places import located

        missing = missing_inputs(located(config, Path(config.visft.run.out or "")))
        if options.dry_run:
            from visft_ds.run.start_report import print_dry_run

            told = render_missing(missing) if missing else ""
            return print_dry_run(config, world_size, told, as_json=options.json) if rank == 0 else 0
        if missing:
            raise ValueError(render_missing(missing))
        from visft_ds.train import train

        again = [*program("train").split(), *words]
        ended = train(config, resume=options.resume, command=again, stop=stop)
        return config.visft.run.requeue_code if ended.requeue else 0
    except KeyboardInterrupt as error:
        return exit_code(error)
    except (ValueError, OSError, StoreFailed) as error:
        if is_told_here(error):
            print(f"{f'[rank {rank}] ' if rank else ''}error: {error}", file=sys.stderr, flush=True)
        return exit_code(error)
    except FloatingPointError as error:
        if is_told_here(error):
            print(f"[rank {rank}] error: {error}", file=sys.stderr, flush=True)
        return exit_code(error)
    except RanksDiffer as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return exit_code(error)
    except RuntimeError as error:
        if not isinstance(error, LostRank) and not LOST_PEER.search(str(error)):
            raise
        # The rank that failed reports why; the traceback of one that only waited for it would bury that.
        lost = error if isinstance(error, LostRank) else LostRank("another rank ended first")
        print(f"[rank {rank}] stopped: {lost}", file=sys.stderr, flush=True)
        return exit_code(lost)


if __name__ == "__main__":
    sys.exit(main())
