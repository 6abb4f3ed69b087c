"""The sub-command `peft` of `tools/profile.py`: its flags, and who prints."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from visft_ds.profiling.command import _check_all_known, _check_folder, _command, _show, _threads

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
    parser.add_argument("--pixels", type=int, nargs="+", default=(224, 448), metavar="N", help="sides (224 448)")
    parser.add_argument("--dtypes", nargs="+", default=("fp32", "bf16"), metavar="TYPE", help="(fp32 bf16), or fp16")
    parser.add_argument("--depth", type=int, default=2, metavar="N", help="blocks (%(default)s)")
    parser.add_argument("--rank", type=int, default=64, metavar="N", help="of the adapters on q and v (%(default)s)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="images (%(default)s)")
    parser.add_argument("--stream", default="16bit", metavar="TYPE", help="timm's in 16 bit: (%(default)s), or fp32")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="rounds after one (%(default)s)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (as it is)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(%(default)s)")
    parser.add_argument("--small", action="store_true", help="debug width instead of EVA-ViT-E's")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured there")
    parser.set_defaults(run=profile_peft)


def profile_peft(options: argparse.Namespace, rest: Sequence[str], command: Sequence[str]) -> int:
    """Measure, print, write. Returns the exit status.

    Raises:
        ValueError: an unknown argument, a value out of range, no timm, or no folder for the record.
    """
    _check_all_known(rest, options)
    _check_folder(options.json)
    if options.threads is not None and options.threads < 1:
        raise ValueError(f"--threads {options.threads} must be at least 1")
    from visft_ds.profiling.peft_step import PeftOptions, make_sections, make_title, measure_peft

    names = ("pixels", "dtypes", "depth", "rank", "batch", "stream", "repeats", "device", "small")
    chosen = PeftOptions(**{name: getattr(options, name) for name in names})
    with _threads(options.threads):
        record = measure_peft(chosen) | {"command": list(command)}
    _show(record, make_title, make_sections, options.json)
    return 0
