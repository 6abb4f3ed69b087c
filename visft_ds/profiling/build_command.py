"""The sub-command `build` of `tools/profile.py`: what packing a data set costs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from visft_ds.profiling.command import _check_all_known, _check_folder, _command, _show

_CHECKS = ("decode", "header", "none")
_EPILOG = """examples:
  python tools/profile.py build --photographs train2017 --workers 2
  python tools/profile.py build --annotations 860001          the annotations of COCO's size, some 15 s
"""


def add_build_parser(commands: Any) -> None:
    """Add the sub-command that times `tools/make_shards.py build`."""
    parser = _command(
        commands,
        "build",
        help="packing: images a second by depth of the check and by workers; time and memory of the annotations",
        description="Time the making of shards: images by depth of the check and by workers, and annotations alone.",
        epilog=_EPILOG,
    )
    parser.add_argument("--images", type=int, default=200, metavar="N", help="images to pack (%(default)s)")
    parser.add_argument("--photographs", type=Path, metavar="DIR", help="take these *.jpg, not made-up pictures")
    parser.add_argument("--check", choices=_CHECKS, action="append", help="this depth only (repeat for more)")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="1 to N threads (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="of everything in turn (%(default)s)")
    parser.add_argument("--annotations", type=int, default=0, metavar="N", help="also read N made-up instances")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured there")
    parser.set_defaults(run=profile_build)


def profile_build(options: argparse.Namespace, rest: Sequence[str], command: Sequence[str]) -> int:
    """Measure, print, write. Returns the exit status.

    Args:
        options: of the sub-command.
        rest: arguments that it does not know; there must be none.
        command: the whole command line, which is recorded.

    Raises:
        ValueError: an unknown argument, a value out of range, no photographs, or no folder for the record.
    """
    _check_all_known(rest, options)
    _check_folder(options.json)
    from visft_ds.profiling.conversion import ConversionOptions, make_sections, make_title, measure_conversion

    names = ("images", "photographs", "workers", "repeats", "annotations")
    given: dict[str, Any] = {name: getattr(options, name) for name in names}
    if options.check:
        given["checks"] = tuple(options.check)
    record = measure_conversion(ConversionOptions(**given)) | {"command": list(command)}
    _show(record, make_title, make_sections, options.json)
    return 0
