"""Training of a stage: `visft train`, or through a launcher `deepspeed --module visft_ds.launch --stage 2`.

Torch and DeepSpeed are imported only when the run can really start.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from visft_ds import importing, program
from visft_ds.config import derive_batches
from visft_ds.errors import tell
from visft_ds.prepare.inputs import missing_inputs, render_missing
from visft_ds.prepare.settle import settle
from visft_ds.resilience.processes import start_ranks, without_num_gpus
from visft_ds.resilience.stop import StopFlag


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit code: 0 trained to the end, as `Stop.status` after a stop, else
    `exit_code`.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        is_rank = "RANK" in os.environ
        stop = StopFlag(launched=is_rank)
        words, count = without_num_gpus(words)
        processes = count or int(os.environ.get("WORLD_SIZE", "1"))
        options, config, sets = settle(words, processes)
        if options.dry_run:
            # An error of another rank would make its launcher end the first.
            if os.environ.get("RANK", "0") != "0":
                return 0
            from visft_ds.run.report import print_dry_run

            print_dry_run(config, sets, processes)
        missing = missing_inputs(config)
        if missing:
            raise ValueError(render_missing(missing))
        if options.dry_run:
            return 0
        if count is not None and not is_rank:
            derive_batches(config, count)
            return start_ranks(["train", *words], count)
        with importing():
            from visft_ds.train import train

        assert sets is not None  # nothing is missing
        command = [*program("train").split(), *words]
        result = train(config, sets, resume=options.resume, command=command, stop=stop)
        if result.finished and os.environ.get("RANK", "0") == "0":
            from visft_ds.run.advice import next_commands

            print("\n".join(next_commands(config.visft)), flush=True)
        return result.stopped.status(config.visft.run.requeue_code)
    except (ValueError, OSError, FloatingPointError, RuntimeError, MemoryError) as error:
        return tell(error)


if __name__ == "__main__":
    from visft_ds.cli import main as visft  # which answers a Ctrl-C

    sys.exit(visft(["train", *sys.argv[1:]]))
