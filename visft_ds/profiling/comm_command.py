"""The sub-command `comm` of `visft profile`: its flags, and who prints."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from visft_ds.profiling.command import _check_folder, _command, _resolve, _show

_EPILOG = """every other flag is one of visft train and means what it means there:
  --stage --model --engine --set --deepspeed_config; no data, weights or heads are needed.

examples:
  deepspeed --num_gpus 2 --module visft_ds profile comm --stage 2 --model debug
  deepspeed --num_gpus 8 --module visft_ds profile comm --stage 2 --engine zero3 --json comm.json --csv comm.csv
  deepspeed --num_gpus 2 --module visft_ds profile comm --stage 2 --model debug --engine pipeline
"""


def add_comm_parser(commands: Any) -> None:
    """Add the sub-command that measures what processes send each other."""
    parser = _command(
        commands,
        "comm",
        help="bandwidth and latency of the calls that engines use, at the sizes of a configuration; share of a step",
        description="Measure the collectives and sends of a configuration's engine on two processes or more.",
        epilog=_EPILOG,
    )
    parser.add_argument("--sizes", type=int, nargs="+", metavar="BYTES", help="of the sweep (1 KiB to 32 MiB)")
    parser.add_argument("--max-bytes", type=int, metavar="N", help="of one message (32 MiB; 1 GiB on GPUs)")
    parser.add_argument("--repeats", type=int, default=10, metavar="N", help="rounds after one (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured there")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write a row for every call there")
    parser.set_defaults(run=profile_comm, parser=parser)


def profile_comm(options: argparse.Namespace, rest: Sequence[str], command: Sequence[str]) -> int:
    """Measure, print, write. Collective; rank 0 prints and writes. Returns the exit status.

    Raises:
        ValueError: what a user can mend.
    """
    config = _resolve(options.parser, rest, synthetic=True)
    if isinstance(config, int):
        return config
    _check_folder(options.json)
    _check_folder(options.csv)
    from visft_ds.profiling.collectives import CommOptions, measure_comm
    from visft_ds.profiling.comm_report import make_sections, make_title, write_csv

    record = measure_comm(config, CommOptions(options.sizes, options.max_bytes, options.repeats))
    if record is not None:
        _show(record | {"command": list(command)}, make_title, make_sections, options.json)
        if options.csv is not None:
            write_csv(record, options.csv)
            print(f"wrote {options.csv}", flush=True)
    return 0
