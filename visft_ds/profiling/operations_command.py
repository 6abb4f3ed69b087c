"""The sub-command `ops` of `tools/profile.py`: its flags, and who prints."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from visft_ds.profiling.command import _check_all_known, _check_folder, _command, _show, _threads

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
    parser.add_argument("--pixels", type=int, nargs="+", default=(224, 448), metavar="N", help="sides (224 448)")
    parser.add_argument("--dtypes", nargs="+", default=("fp32", "bf16"), metavar="TYPE", help="(fp32 bf16), or fp16")
    parser.add_argument("--depth", type=int, default=2, metavar="N", help="blocks (%(default)s)")
    parser.add_argument("--rank", type=int, default=64, metavar="N", help="of the adapters (%(default)s)")
    parser.add_argument("--targets", nargs="+", default=("q", "v"), metavar="T", help="of the projection (q v), or k")
    parser.add_argument("--parts", nargs="+", choices=_PARTS, default=_PARTS, help="what to measure (all)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="rounds after one (%(default)s)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (as it is)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(%(default)s)")
    parser.add_argument("--small", action="store_true", help="debug width instead of EVA-ViT-E's")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured there")
    parser.set_defaults(run=profile_operations)


def profile_operations(options: argparse.Namespace, rest: Sequence[str], command: Sequence[str]) -> int:
    """Measure, print, write. Returns the exit status.

    Raises:
        ValueError: an unknown argument, a value out of range, or no folder for the record.
    """
    _check_all_known(rest, options)
    _check_folder(options.json)
    if options.threads is not None and options.threads < 1:
        raise ValueError(f"--threads {options.threads} must be at least 1")
    from visft_ds.profiling.operations import OperationOptions, make_sections, make_title, measure_operations

    names = ("pixels", "dtypes", "depth", "rank", "targets", "parts", "repeats", "device", "small")
    chosen = OperationOptions(**{name: getattr(options, name) for name in names})
    with _threads(options.threads):
        record = measure_operations(chosen) | {"command": list(command)}
    _show(record, make_title, make_sections, options.json)
    return 0
