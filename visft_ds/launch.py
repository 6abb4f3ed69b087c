"""Training of a stage: `visft train`, or through a launcher `deepspeed --module visft_ds.launch --stage 2`.

Torch and DeepSpeed are imported only when the run can really start.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from visft_ds import program
from visft_ds.config import derive_batches
from visft_ds.prepare.settle import settle
from visft_ds.prepare.inputs import missing_inputs, render_missing
from visft_ds.resilience.errors import tell
from visft_ds.resilience.processes import start_ranks, without_num_gpus
from visft_ds.resilience.stop import StopFlag


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit code: 0 trained to the end, as `Stop.status` after a stop, else
    `exit_code`.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        stop = StopFlag(launched="RANK" in os.environ)
        words, count = without_num_gpus(words)
        options, config = resolve_arguments(words)
        if options.dry_run:
            if int(
                os.environ.get("RANK", "0")
            ):  # an error of this rank would make its launcher end the first
                return 0
            from visft_ds.run.report import print_dry_run

            print_dry_run(config, count or int(os.environ.get("WORLD_SIZE", "1")))
        if lacking := missing_inputs(config):
            raise ValueError(render_missing(lacking))
        if options.dry_run:
            return 0
        if count is not None and "RANK" not in os.environ:
            derive_batches(config, count)
            return start_ranks(["train", *words], count)
        from visft_ds.train import train

        command = [*program("train").split(), *words]
        result = train(config, resume=options.resume, command=command, stop=stop)
        return result.stopped.status(config.visft.run.requeue_code)
    except (ValueError, OSError, FloatingPointError, RuntimeError, MemoryError) as error:
        return tell(error)


if __name__ == "__main__":
    from visft_ds.cli import main as visft  # which answers a Ctrl-C

    sys.exit(visft(["train", *sys.argv[1:]]))
