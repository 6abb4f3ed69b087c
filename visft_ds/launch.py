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
from visft_ds.resilience.errors import exit_code, tell
from visft_ds.resilience.signals import StopFlag


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit code: 0 done or stopped cleanly (`visft.run.requeue_code` after SIGUSR1), else
    as `exit_code`; 3 where another rank was killed or hangs, and after a dry run of what could not start."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    stop = StopFlag(launched="RANK" in os.environ)
    stop.guard_start()
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    try:
        options, config = resolve_arguments(words)
        stop.requeue_code = config.visft.run.requeue_code
        from visft_ds.prepare.places import located, of_parent

        config = of_parent(config)
        missing = missing_inputs(located(config, Path(config.visft.run.out or "")))
        if options.dry_run:
            from visft_ds.run.start_report import print_dry_run

            told = render_missing(missing) if missing else ""
            return print_dry_run(config, world_size, told, as_json=options.json) if rank == 0 else 0
        if missing:
            raise ValueError(render_missing(missing))
        from visft_ds.train import train

        ended = train(config, resume=options.resume, command=_again(words, world_size), stop=stop)
        return config.visft.run.requeue_code if ended.requeue else 0
    except KeyboardInterrupt as error:
        return exit_code(error)
    except (ValueError, OSError, FloatingPointError, RuntimeError) as error:
        return tell(error)


def _again(words: Sequence[str], world_size: int) -> list[str]:
    """The command that starts this run again; of several machines the launcher's own part is not known."""
    words = [word for word in words if not word.startswith("--local_rank")]  # the deepspeed launcher puts it in front
    command, here = program("train").split(), os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE")
    if here is None or int(here) != world_size or world_size == 1:
        return [*command, *words]
    processes = ["--num_gpus", here]
    return [*command, *processes, *words] if command[0] == "visft" else ["deepspeed", *processes, *command, *words]


if __name__ == "__main__":
    sys.exit(main())
