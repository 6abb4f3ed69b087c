"""Make a toy data set in COCO's own form: textured shapes with polygons, RLE crowds and five captions an image.

visft toy --out toy --train 2000 --val 200 --size 112
visft toy --out toy_b --train 0 --val 200 --size 160x112 --style b
visft toy --out toy_even --colours even
visft toy --out shapes_b --classification shape --train 0 --val 480 --style b

With --classification one shape a picture in folders of classes, for `visft evaluate benchmarks`, zero_shot= and probe=.

The same arguments give the same bytes, whatever the number of workers.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from visft_ds import program
from visft_ds.flags import Parser
from visft_ds.redaction import redacted
from visft_ds.toy.annotations import write_toy_coco
from visft_ds.toy.classes import KINDS, write_toy_classes
from visft_ds.toy.scenes import COLOURS, MAX_SHAPES, STYLES


def _size(text: str) -> tuple[int, int]:
    """(width, height) of `160x112`, or of `112` for a square."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write 112 or 160x112 (width x height, pixels)")
    return int(match[1]), int(match[2] or match[1])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = Parser(prog=program("toy"), description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="a new or empty folder")
    parser.add_argument("--train", type=int, default=2000, help="images in train2017 or train/ (%(default)s)")
    parser.add_argument("--val", type=int, default=200, help="images in val2017 or test/ (%(default)s)")
    parser.add_argument("--size", type=_size, default=(112, 112), metavar="WxH", help="pixels, or one side (112)")
    parser.add_argument("--style", choices=sorted(STYLES), default="a", help="b and c have other colours and textures")
    parser.add_argument(
        "--colours", choices=COLOURS, default="usual", help="even: any shape in any colour, which says nothing of it"
    )
    parser.add_argument("--without", metavar="A,B", help="shapes that no picture shows; they stay in the list")
    parser.add_argument(
        "--max-shapes", type=int, default=MAX_SHAPES, metavar="N", help="in a picture (3); 18 make COCO's 7 on average"
    )
    parser.add_argument("--classification", choices=KINDS, help="one shape a picture, in test/CLASS/ and train/CLASS/")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)")
    given = parser.parse_args(arguments)
    try:
        print(_write_classes(given) if given.classification else _write_scenes(given))
    except (ValueError, OSError) as error:
        print(f"toy: {redacted(error)}", file=sys.stderr)
        return 2
    return 0


def _write_scenes(given: argparse.Namespace) -> str:
    width, height = given.size
    counts = write_toy_coco(
        given.out,
        train=given.train,
        val=given.val,
        height=height,
        width=width,
        style=given.style,
        colours=given.colours,
        without=tuple(given.without.split(",")) if given.without else (),
        seed=given.seed,
        max_shapes=given.max_shapes,
        workers=given.workers,
    )
    return (
        f"{given.out}: {counts['images']} images ({counts['empty']} empty), {counts['instances']} instances "
        f"({counts['crowds']} crowds), style {given.style}, {width}x{height}, {counts['seconds']:.1f} s"
    )


def _write_classes(given: argparse.Namespace) -> str:
    if given.max_shapes != MAX_SHAPES or given.without:
        raise ValueError(
            "--max-shapes and --without contradict --classification: a class has one shape a picture, all are classes"
        )
    width, height = given.size
    counts = write_toy_classes(
        given.out,
        given.classification,
        train=given.train,
        test=given.val,
        height=height,
        width=width,
        style=given.style,
        colours=given.colours,
        seed=given.seed,
    )
    return (
        f"{given.out}: {counts['images']} images of {counts['classes']} classes ({given.classification}), "
        f"style {given.style}, {width}x{height}, {counts['seconds']:.1f} s"
    )
