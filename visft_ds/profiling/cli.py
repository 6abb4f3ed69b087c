"""Measure: how fast, where the time goes, what fills the memory, how far from the hardware's limit.

    visft profile train --stage 2 --model debug --data shards
    deepspeed --num_gpus 8 --module visft_ds profile train --stage 2 --synthetic --json profile.json
    visft profile data --data shards
    visft plan --cluster 8xA100-80GB
    deepspeed --num_gpus 2 --module visft_ds profile comm --stage 2 --model debug
    visft profile ops
    visft profile peft

Exit status: 0 measured, 1 memory is not as planned, 2 wrong usage or something missing, 3 another rank ended first.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from visft_ds import program
from visft_ds.config.removed import refuse_removed
from visft_ds.profiling.block_commands import add_operations_parser, add_peft_parser
from visft_ds.profiling.comm_command import add_comm_parser
from visft_ds.profiling.command import add_train_parser
from visft_ds.profiling.data_command import add_data_parser
from visft_ds.profiling.plan_command import add_plan_parser
from visft_ds.resilience.signals import LOST_PEER

TOOL = "tools/profile.py"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    return _run(sys.argv[1:] if arguments is None else arguments, program("profile"))


def plan(arguments: Sequence[str]) -> int:
    """Run the command `plan`, which `visft` also has by itself; returns the exit status."""
    return _run(["plan", *arguments], "visft")


def _run(given: Sequence[str], name: str) -> int:
    rank = int(os.environ.get("RANK", "0"))
    try:
        refuse_removed(TOOL, given)
        options, rest = _parser(name).parse_known_args(given)
        return int(options.run(options, rest, [*name.split(), *given]))
    except (ValueError, argparse.ArgumentError) as error:
        # Every rank runs into the same mistake; one message is enough. One that only this rank sees says so.
        if rank == 0 or getattr(error, "of_one_rank", False):
            print(f"{f'[rank {rank}] ' if rank else ''}error: {error}", file=sys.stderr, flush=True)
        return 2
    except RuntimeError as error:
        if not LOST_PEER.search(str(error)):
            raise
        print(f"[rank {rank}] stopped: another rank ended first", file=sys.stderr, flush=True)
        return 3


def _parser(name: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=name,
        description="Measure what a configuration costs.",
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher may add it
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add_parser in (
        add_train_parser,
        add_data_parser,
        add_plan_parser,
        add_operations_parser,
        add_peft_parser,
        add_comm_parser,
    ):
        add_parser(commands)
    return parser
