"""`visft profile`: N steps of the real run, with any engine: images a second, MFU, time by part, memory, a
trace.

Exit status: 0 measured, 2 wrong usage or something missing, 3 another rank ended first.
"""

from __future__ import annotations

import json
import statistics
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from visft_ds.errors import tell
from visft_ds.flags import Command, add_num_gpus, check_least
from visft_ds.prepare.inputs import missing_inputs, render_missing
from visft_ds.prepare.settle import settle

_GIB = 2**30
_EPILOG = """every other flag is one of visft train and means the same: --stage, --model, --data, ...
nothing is written but the files of --json and --trace.

examples:
  visft profile --stage 2 --model debug --data shards
  visft profile --num_gpus 8 --stage 2 --synthetic --json profile.json
  deepspeed --num_gpus 8 tools/profile.py --stage 2 --engine pipeline --trace traces
  visft profile --stage 2 --model dinov3_b --data shards --loader
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
    add_num_gpus(parser)
    add("--json", type=Path, metavar="FILE", help="file for the numbers")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; returns the exit status. Every rank measures, the main one prints."""
    try:
        options, rest = build_parser().parse_known_args(arguments)
        _check(options)
        config = settle(rest).config
        missing = [] if options.synthetic else missing_inputs(config)
        if missing:
            raise ValueError(f"{render_missing(missing)}\nor measure without files: --synthetic")
        from visft_ds.profiling import measure  # imports torch and deepspeed, which costs seconds

        settings = {"steps": options.steps, "warmup": options.warmup, "synthetic": options.synthetic}
        if options.loader:
            record = measure.measure_loader(config, **settings)
            text = render_loader(record)
        else:
            record = measure.measure(config, **settings, trace=options.trace)
            if not record:  # not the main process
                return 0
            text = render(record)
        print(text, flush=True)
        if options.json is not None:
            options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        return tell(error)
    return 0


def _check(options: Namespace) -> None:
    """Refuse numbers and files before anything is measured."""
    file = options.json
    folder = options.trace
    check_least(options, steps=1, warmup=1)
    if file is not None and (file.is_dir() or not file.resolve().parent.is_dir()):
        raise ValueError(f"--json {file}: give a file in a folder that exists")
    if folder is not None and folder.exists() and not folder.is_dir():
        raise ValueError(f"--trace {folder}: give a folder")


def render_loader(record: Mapping[str, Any]) -> str:
    """A line for each stream."""
    speeds = {stream: speed["samples"] / speed["seconds"] for stream, speed in record["loader"].items()}
    return "\n".join(f"{stream:16}{speed:10.1f} samples/s" for stream, speed in speeds.items())


def render(record: Mapping[str, Any]) -> str:
    """A line for each stream, of its slowest rank; below it the time by part and the planned memory by
    part.
    """
    lines = [f"{'':16}{'images/s':>10}{'ms/step':>10}{'TFLOP/s':>10}{'MFU':>8}{'peak GiB':>10}{'planned':>9}"]
    for stream in record["ranks"][0]:
        profiles = [rank[stream] for rank in record["ranks"]]
        slowest = max(profiles, key=lambda profile: statistics.median(profile["seconds"]))
        seconds = statistics.median(slowest["seconds"])
        peak = max(profile["peak"] for profile in profiles)
        teraflops = slowest["operations"] / seconds / 1e12
        mfu = "" if slowest["mfu"] is None else f"{slowest['mfu']:.1%}"
        planned = sum(slowest["planned"].values())
        lines.append(
            f"{stream:16}{slowest['images'] / seconds:10.2f}{1e3 * seconds:10.1f}{teraflops:10.3g}{mfu:>8}"
            f"{peak / _GIB:10.2f}{planned / _GIB:9.2f}"
        )
        step = sum(slowest["parts"].values())
        for part, spent in slowest["parts"].items():
            lines.append(f"  {part:14}{1e3 * spent:20.1f}{spent / step:10.1%}")
        for part, size in slowest["planned"].items():
            if size:
                lines.append(f"  {part:14}{size / _GIB:57.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
