"""The sub-commands `ops` and `peft` of `visft profile`, which measure blocks of a backbone by themselves."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from visft_ds.profiling.command import _check_all_known, _check_folder, _command, _show, _threads

_PARTS = ("blocks", "projection", "kept")
_OPS_EPILOG = """examples:
  visft profile ops
  visft profile ops --pixels 224 --dtypes fp32 --repeats 3
  visft profile ops --device cuda --dtypes bf16 --pixels 224 448 1022 --repeats 30
"""
_PEFT_EPILOG = """examples:
  visft profile peft
  visft profile peft --pixels 224 --dtypes fp32 --depth 4 --repeats 3
  visft profile peft --device cuda --dtypes bf16 --batch 8 --repeats 30
"""


def add_operations_parser(commands: Any) -> None:
    """Add the sub-command that compares adapted blocks with frozen ones."""
    parser = _command(
        commands,
        "ops",
        help="adapted blocks over frozen ones: time by way of adapting, and what they keep for the backward pass",
        description="Measure blocks with adapters beside the same blocks without, and beside other ways to adapt them.",
        epilog=_OPS_EPILOG,
    )
    _add_block_flags(parser, rank="of the adapters")
    parser.add_argument("--targets", nargs="+", default=("q", "v"), metavar="T", help="of the projection (q v), or k")
    parser.add_argument("--parts", nargs="+", choices=_PARTS, default=_PARTS, help="what to measure (all)")
    parser.set_defaults(run=profile_operations)


def add_peft_parser(commands: Any) -> None:
    """Add the sub-command that compares the backbone's step with that of timm under PEFT."""
    parser = _command(
        commands,
        "peft",
        help="the backbone's part of a stage-2 step against the same tower in timm under PEFT: time, peak memory",
        description="Measure forward, backward and update of a tower with adapters beside timm + PEFT (needs timm).",
        epilog=_PEFT_EPILOG,
    )
    _add_block_flags(parser, rank="of the adapters on q and v")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="images (%(default)s)")
    parser.add_argument("--stream", default="16bit", metavar="TYPE", help="timm's in 16 bit: (%(default)s), or fp32")
    parser.set_defaults(run=profile_peft)


def _add_block_flags(parser: argparse.ArgumentParser, *, rank: str) -> None:
    """Add the flags of both; `rank` says which adapters have it."""
    parser.add_argument("--pixels", type=int, nargs="+", default=(224, 448), metavar="N", help="sides (224 448)")
    parser.add_argument("--dtypes", nargs="+", default=("fp32", "bf16"), metavar="TYPE", help="(fp32 bf16), or fp16")
    parser.add_argument("--depth", type=int, default=2, metavar="N", help="blocks (%(default)s)")
    parser.add_argument("--rank", type=int, default=64, metavar="N", help=f"{rank} (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="rounds after one (%(default)s)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (as it is)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(%(default)s)")
    parser.add_argument("--small", action="store_true", help="debug width instead of EVA-ViT-E's")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured there")


def profile_operations(options: argparse.Namespace, rest: Sequence[str], command: Sequence[str]) -> int:
    """Measure, print, write. Returns the exit status.

    Raises:
        ValueError: an unknown argument, a value out of range, or no folder for the record.
    """
    _check(options, rest)
    from visft_ds.profiling import blocks as kind

    return _measure(options, command, kind, kind.OperationOptions, kind.measure_operations)


def profile_peft(options: argparse.Namespace, rest: Sequence[str], command: Sequence[str]) -> int:
    """Measure, print, write; arguments and errors as `profile_operations`, and where there is no timm."""
    _check(options, rest)
    from visft_ds.profiling import peft_step as kind

    return _measure(options, command, kind, kind.PeftOptions, kind.measure_peft)


def _check(options: argparse.Namespace, rest: Sequence[str]) -> None:
    _check_all_known(rest, options)
    _check_folder(options.json)
    if options.threads is not None and options.threads < 1:
        raise ValueError(f"--threads {options.threads} must be at least 1")


def _measure(options: argparse.Namespace, command: Sequence[str], kind: Any, chosen: type, measure: Any) -> int:
    """`chosen` is the dataclass of options, whose fields are flags; `kind` the module that makes title and tables."""
    with _threads(options.threads):
        record = measure(chosen(**{field.name: getattr(options, field.name) for field in fields(chosen)}))
    _show(record | {"command": list(command)}, kind.make_title, kind.make_sections, options.json)
    return 0
