"""`visft profile`: N steps of the real run, with any engine: images a second, MFU, time by part, memory, a
trace.

Exit status: 0 measured, 2 wrong usage or something missing, 3 another rank ended first.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from visft_ds.errors import tell
from visft_ds.flags import Command
from visft_ds.prepare.inputs import missing_inputs, render_missing
from visft_ds.prepare.settle import settle

_EPILOG = """every other flag is one of visft train and means what it means there: --stage, --model, --data, ...
nothing is written but the files of --json and --trace.

examples:
  visft profile --stage 2 --model debug --data shards
  visft profile --num_gpus 8 --stage 2 --synthetic --json profile.json
  deepspeed --num_gpus 8 tools/profile.py --stage 2 --engine pipeline --trace traces
  visft profile --stage 2 --data shards --loader
"""


def build_parser() -> Command:
    """Flags of the command itself; all others are those of `visft train`."""
    parser = Command("profile", "Measure N optimiser steps of each task, as training makes them.", _EPILOG)
    add = parser.add_argument
    add("--steps", type=int, default=10, metavar="N", help="steps of each task (%(default)s)")
    add("--warmup", type=int, default=3, metavar="N", help="unmeasured steps before these (%(default)s)")
    add("--synthetic", action="store_true", help="generated images; random weights for missing files")
    add("--loader", action="store_true", help="read batches without a model: samples per second")
    add("--trace", type=Path, metavar="FOLDER", help="trace one more step of each for Perfetto, by operator")
    add("--json", type=Path, metavar="FILE", help="file for the numbers")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; returns the exit status. Every rank measures, the main one prints."""
    try:
        options, rest = build_parser().parse_known_args(arguments)
        if options.steps < 1 or options.warmup < 1:
            raise ValueError("--steps and --warmup: give at least 1 (the first step is never a typical one)")
        if options.json is not None and (options.json.is_dir() or not options.json.resolve().parent.is_dir()):
            raise ValueError(f"--json {options.json}: give a file in a folder that exists")
        if options.trace is not None and options.trace.exists() and not options.trace.is_dir():
            raise ValueError(f"--trace {options.trace}: give a folder")
        config = settle(rest).config
        missing = [] if options.synthetic else missing_inputs(config)
        if missing:
            raise ValueError(f"{render_missing(missing)}\nor measure without files: --synthetic")
        from visft_ds.profiling import measure  # imports torch and deepspeed, which costs seconds

        if options.loader:
            record = measure.measure_loader(
                config, options.steps, options.warmup, synthetic=options.synthetic
            )
            found = record["loader"].items()
            text = "\n".join(
                f"{name:16}{one['samples'] / one['seconds']:10.1f} samples/s" for name, one in found
            )
        else:
            trace = options.trace
            record = measure.measure(
                config, options.steps, options.warmup, synthetic=options.synthetic, trace=trace
            )
            if not record:
                return 0
            text = render(record)
        print(text, flush=True)
        if options.json is not None:
            options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        return tell(error)
    return 0


def render(record: dict[str, Any]) -> str:
    """A line for each stream, of its slowest rank; below it the time by part and the planned memory by
    part.
    """
    lines = [f"{'':16}{'images/s':>10}{'ms/step':>10}{'TFLOP/s':>10}{'MFU':>8}{'peak GiB':>10}{'planned':>9}"]
    for name in record["ranks"][0]:
        one = max(
            (rank[name] for rank in record["ranks"]), key=lambda found: statistics.median(found["seconds"])
        )
        peak = max(rank[name]["peak"] for rank in record["ranks"])
        seconds, planned = statistics.median(one["seconds"]), sum(one["planned"].values())
        mfu = "" if one["utilisation"] is None else f"{one['utilisation']:.1%}"
        speed = f"{one['images'] / seconds:10.2f}{1e3 * seconds:10.1f}{one['operations'] / seconds / 1e12:10.3g}{mfu:>8}"
        lines.append(f"{name:16}{speed}{peak / 2**30:10.2f}{planned / 2**30:9.2f}")
        hooked = sum(one["parts"].values())
        lines += [
            f"  {part:14}{1e3 * spent:20.1f}{spent / hooked:10.1%}" for part, spent in one["parts"].items()
        ]
        lines += [f"  {part:14}{size / 2**30:57.2f}" for part, size in one["planned"].items() if size]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
