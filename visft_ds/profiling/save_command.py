"""The sub-command `save` of `tools/profile.py`: its flags, and who prints."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from visft_ds.config.resolve import available
from visft_ds.profiling.command import _check_all_known, _check_folder, _command, _show

_EPILOG = """examples:
  python tools/profile.py save
  python tools/profile.py save --parameters 14.4e6 --folder /mnt/runs
  deepspeed --num_gpus 8 tools/profile.py save --engine zero3
"""


def add_save_parser(commands: Any) -> None:
    """Add the sub-command that compares a save beside the training with one that stops it."""
    parser = _command(
        commands,
        "save",
        help="how long training stands still for a checkpoint, written by a thread and written at once",
        description="Save the same state both ways in turn: for how long training stands still, what the thread takes.",
        epilog=_EPILOG,
    )
    parser.add_argument("--parameters", type=float, default=29.4e6, metavar="N", help="that train (%(default)g)")
    parser.add_argument("--engine", choices=available("engines"), default="zero1", help="(%(default)s)")
    parser.add_argument("--repeats", type=int, default=10, metavar="N", help="saves of each kind (%(default)s)")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="where to write (the temporary folder)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured there")
    parser.set_defaults(run=profile_saves)


def profile_saves(options: argparse.Namespace, rest: Sequence[str], command: Sequence[str]) -> int:
    """Measure, print, write. Collective; rank 0 prints and writes. Returns the exit status.

    Raises:
        ValueError: what a user can mend.
    """
    _check_all_known(rest, options)
    _check_folder(options.json)
    from visft_ds.profiling.saving import SaveOptions, make_sections, make_title, measure_saves

    names = ("parameters", "engine", "repeats", "folder")
    record = measure_saves(SaveOptions(**{name: getattr(options, name) for name in names}))
    if record is not None:
        _show(record | {"command": list(command)}, make_title, make_sections, options.json)
    return 0
