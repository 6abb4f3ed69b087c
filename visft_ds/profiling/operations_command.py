"""The sub-command `ops` of `tools/profile.py`: its flags, and who prints."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from visft_ds.profiling.command import _add_block_flags, _command, _measure_alone

_PARTS = ("blocks", "projection", "kept")
_EPILOG = """examples:
  python tools/profile.py ops
  python tools/profile.py ops --pixels 224 --dtypes fp32 --repeats 3
  python tools/profile.py ops --device cuda --dtypes bf16 --pixels 224 448 1022 --repeats 30
"""


def add_operations_parser(commands: Any) -> None:
    """Add the sub-command that compares adapted blocks with frozen ones."""
    parser = _command(
        commands,
        "ops",
        help="adapted blocks over frozen ones: time by way of adapting, and what they keep for the backward pass",
        description="Measure blocks with adapters beside the same blocks without, and beside other ways to adapt them.",
        epilog=_EPILOG,
    )
    _add_block_flags(parser, rank="of the adapters")
    parser.add_argument("--targets", nargs="+", default=("q", "v"), metavar="T", help="of the projection (q v), or k")
    parser.add_argument("--parts", nargs="+", choices=_PARTS, default=_PARTS, help="what to measure (all)")
    parser.set_defaults(run=profile_operations)


def profile_operations(options: argparse.Namespace, rest: Sequence[str], command: Sequence[str]) -> int:
    """Measure, print, write. Returns the exit status.

    Raises:
        ValueError: an unknown argument, a value out of range, or no folder for the record.
    """

    def load() -> tuple[Any, Any, Any, Any]:
        from visft_ds.profiling.blocks import OperationOptions, make_sections, make_title, measure_operations

        return OperationOptions, measure_operations, make_title, make_sections

    return _measure_alone(options, rest, command, load)
