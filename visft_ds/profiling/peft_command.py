"""The sub-command `peft` of `tools/profile.py`: its flags, and who prints."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from visft_ds.profiling.command import _add_block_flags, _command, _measure_alone

_EPILOG = """examples:
  python tools/profile.py peft
  python tools/profile.py peft --pixels 224 --dtypes fp32 --depth 4 --repeats 3
  python tools/profile.py peft --device cuda --dtypes bf16 --batch 8 --repeats 30
"""


def add_peft_parser(commands: Any) -> None:
    """Add the sub-command that compares the backbone's step with that of timm under PEFT."""
    parser = _command(
        commands,
        "peft",
        help="the backbone's part of a stage-2 step against the same tower in timm under PEFT: time, peak memory",
        description="Measure forward, backward and update of a tower with adapters beside timm + PEFT (needs timm).",
        epilog=_EPILOG,
    )
    _add_block_flags(parser, rank="of the adapters on q and v")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="images (%(default)s)")
    parser.add_argument("--stream", default="16bit", metavar="TYPE", help="timm's in 16 bit: (%(default)s), or fp32")
    parser.set_defaults(run=profile_peft)


def profile_peft(options: argparse.Namespace, rest: Sequence[str], command: Sequence[str]) -> int:
    """Measure, print, write. Returns the exit status.

    Raises:
        ValueError: an unknown argument, a value out of range, no timm, or no folder for the record.
    """

    def load() -> tuple[Any, Any, Any, Any]:
        from visft_ds.profiling.peft_step import PeftOptions, make_sections, make_title, measure_peft

        return PeftOptions, measure_peft, make_title, make_sections

    return _measure_alone(options, rest, command, load)
