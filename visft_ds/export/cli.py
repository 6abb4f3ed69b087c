"""Flags of `visft export`. What costs seconds to import is imported when the flags are right."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from visft_ds import program
from visft_ds.errors import tell
from visft_ds.flags import Parser, check_extra
from visft_ds.predict.cli import add_parts
from visft_ds.run_files import check_exists

USAGE = """Write a trained model as files that run without this package: backbone, head, decoding in one.

    visft export runs/stage1-small_data --out exported
    visft export runs/stage1-small_data --out exported --tasks detection --web
    visft export runs/stage1-small_data --out small --int8
    visft export runs/stage2 --out backbone --tasks none

Each task becomes a file TASK.onnx (or TASK.pt2, a program of torch): uint8 RGB pictures (B, H, W, 3) of any
size in; boxes in their pixels, scores, labels, masks or word ids out. README.md in the folder shows how to
run them; visft predict --run FOLDER and visft_ds.load(FOLDER) read it back.

Exit status: 0 written, 2 it does not say what the model says (nothing is kept), or wrong usage or input.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    flags = _parser().parse_args(arguments)
    try:
        check_exists(flags.run)
        if flags.format == "onnx":
            check_extra("visft export", "onnx", ("onnx", "onnxscript", "onnxruntime"))
        from visft_ds.export.command import export

        export(flags)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        return tell(error, "export")
    return 0


def picture_size(text: str) -> tuple[int, int]:
    """(height, width) of HEIGHTxWIDTH."""
    sides = text.split("x")
    if len(sides) != 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise argparse.ArgumentTypeError(f"{text} is not allowed: give HEIGHTxWIDTH, such as 480x640")
    height, width = sides
    return int(height), int(width)


def pictures_to_verify(text: str) -> int | None:
    """Number of pictures, at least 1; None: all."""
    if text == "all":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not allowed: give a number from 1, or all")
    return int(text)


def _parser() -> Parser:
    parser = Parser(
        prog=program("export"), description=USAGE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="a run, RUN/checkpoints/step_N or RUN/export")
    add("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    add("--format", choices=("onnx", "torch"), default="onnx", help="ONNX, or torch.export (%(default)s)")
    add_parts(parser)
    shape = "shape of the pictures, where evaluation depends on it (default: of most validation pictures)"
    add("--picture-size", type=picture_size, metavar="HxW", help=shape)
    verify = "pictures that predictions must be equal on (%(default)s), or all, with metrics of both"
    add("--verify", type=pictures_to_verify, default=16, metavar="N|all", help=verify)
    images = "pictures to compare instead of the run's validation split"
    add("--images", nargs="+", metavar="IMAGE|FOLDER|PATTERN", help=images)
    add("--half", action="store_true", help="backbone in fp16; metrics may fall by a point")
    add("--int8", action="store_true", help="convolutions and layers in 8 bits, calibrated; likewise")
    add("--allow-loss", action="store_true", help="keep --half or --int8 whatever it costs")
    add("--web", action="store_true", help="also index.html, which runs the detector in a browser")
    return parser
