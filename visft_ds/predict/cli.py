"""Flags of `visft predict`. What costs seconds to import is imported when the flags are right."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from visft_ds import importing, program
from visft_ds.config.flags import BACKBONE_HELP, DOWNLOAD_HELP
from visft_ds.errors import tell
from visft_ds.flags import Parser, check_options, command_parser
from visft_ds.predict.images import find_images
from visft_ds.run_files import check_exists

USAGE = """Find boxes, masks and captions in your own images; no annotations are needed.

    visft predict runs/stage2 dog.jpg
    visft predict runs/stage2 photos/ more/*.png --threshold 0.7 --out found
    visft predict merged.safetensors "photos/**/*.jpg" --heads runs/stage1/export

Writes into DIR, a new or empty folder: visualizations/NAME.jpg and predictions.json (names and sizes of the
images, categories, and for each task what was found, in COCO's results format). A file that is no image is
named and skipped. Until the end, predictions.jsonl has a line for each finished image, and the same command
continues after it.

Exit status: 0 something was predicted, 2 nothing was, wrong usage or unusable input, 130 interrupted.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    options = vars(_parser().parse_args(arguments))
    try:
        check_options(
            options["threshold"], batch_size=options["batch_size"], image_size=options["image_size"]
        )
        run = options.pop("run")
        images = options.pop("arguments")
        if run is None and images:
            run = Path(images.pop(0))
        if not images:
            raise ValueError(f"no image is named; type {program('predict')} RUN IMAGE")
        check_exists(run)
        files = find_images(images, outside=options["out"])
        with importing():
            from visft_ds.predict.command import predict

        predict(files, source=run, **options)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        return tell(error, "predict")
    return 0


def add_parts(group: argparse._ActionsContainer) -> None:
    """Add the flags that replace parts of a run: backbone, heads, adapter, tasks, vocabulary."""
    add = group.add_argument
    add("--backbone", metavar="NAME|FILE", help=BACKBONE_HELP)
    add("--download", action="store_true", help=DOWNLOAD_HELP)
    add("--heads", type=Path, metavar="DIR", help="folder of heads: RUN/export, or ViSFT's published files")
    add("--adapter", metavar="DIR", help="adapter folder (RUN/export/adapter), or none")
    add("--tasks", metavar="A,B", help="tasks (default: all that have a head)")
    add("--vocabulary", type=Path, metavar="FILE", help="word map of a published captioning head")


def _parser() -> Parser:
    parser = command_parser("predict", USAGE)
    add = parser.add_argument
    run = "a run, RUN/checkpoints/step_N, RUN/export, or merged weights"
    images = "JPEG, PNG, WebP, BMP, GIF or TIFF; folders and all below them; patterns with *, ?, [...] or **"
    # One list: without --run its first member is the run, with it all are images.
    add("arguments", nargs="*", metavar="RUN IMAGE|FOLDER|PATTERN", help=f"first {run}; then {images}")
    add("--run", type=Path, metavar="RUN", help="the run as a flag; every argument is then an image")
    add_parts(parser)
    add("--image-size", type=int, metavar="PIXELS", help="resize to squares (default: as the run)")
    tile = "cut larger images into squares of this side, or none (default: as the run)"
    add("--tile", metavar="PIXELS", help=tile)
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    add("--precision", choices=("auto", "fp32", "bf16", "fp16"), help="default: the run's, or auto")
    add("--batch-size", type=int, metavar="N", help="images per batch (default: the run's, or 8)")
    add("--out", type=Path, default=Path("predictions"), metavar="DIR", help="new or empty (%(default)s)")
    add("--threshold", type=float, default=0.5, metavar="SCORE", help="least confidence shown (%(default)s)")
    return parser
