"""`visft toy`: a toy data set in COCO's own form: images of shapes with polygons, RLE crowds and five
captions each.

    visft toy --out toy --train 2000 --val 200 --size 112
    visft toy --out toy_b --train 0 --val 200 --size 160x112 --style b --colours even
    visft toy --out toy_17 --style 17               # colours, textures and noise drawn by a number

Everything about image i of a split is a function of (seed, style, colours, split, size, most shapes, i): the
number of workers changes nothing, and `train=100` gives the first hundred images of `train=1000`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import signal
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from PIL import Image

from visft_ds import program
from visft_ds.errors import tell
from visft_ds.flags import Parser
from visft_ds.toy.scenes import (
    CATEGORIES,
    COLOURS,
    MAX_SHAPES,
    NAMES,
    STYLES,
    Array,
    Scene,
    Shape,
    Style,
    draw_scene,
    style_of,
)

SPLITS = ("train2017", "val2017")
MIN_SIDE = 28
MAX_SIDE = 4096
JPEG_QUALITY = 92
_NUMBERS = (
    *(
        "no",
        "one",
        "two",
        "three",
        "four",
        "five",
        "six",
        "seven",
        "eight",
        "nine",
        "ten",
        "eleven",
        "twelve",
    ),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
)


def _join(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def with_article(words: str) -> str:
    """`a star`, `an hourglass`."""
    return f"{'an' if words[0] in 'aeiou' or words.startswith('hour') else 'a'} {words}"


def _plural(words: str) -> str:
    """`red stars` of `red star`: the last word is the noun."""
    return f"{words}es" if words.endswith("s") else f"{words}s"


def _counted(words: str, count: int) -> str:
    """`a red star`, `two red stars`."""
    return with_article(words) if count == 1 else f"{_NUMBERS[count]} {_plural(words)}"


def _middle(shape: Shape) -> tuple[float, float]:
    """Mean of the visible pixels, (x, y) relative to the image."""
    y, x = np.nonzero(shape.visible)
    return float(x.mean() + 0.5) / shape.visible.shape[1], float(y.mean() + 0.5) / shape.visible.shape[0]


def _where(shape: Shape) -> str:
    x, y = _middle(shape)
    column = "left" if x < 0.38 else "right" if x > 0.62 else ""
    row = "top" if y < 0.38 else "bottom" if y > 0.62 else ""
    if row and column:
        return f"in the {row} {column} corner"
    if row or column:
        return f"at the {row}" if row else f"on the {column}"
    return "in the middle"


def _details(shape: Shape, share: float) -> str:
    """Size, texture, colour and name of a shape; `share` is its part of the image's pixels."""
    size = "large " if share > 0.11 else "small " if share < 0.045 else ""
    return f"{size}{'' if shape.texture == 'plain' else shape.texture + ' '}{shape.colour} {NAMES[shape.category]}"


def _relation(rng: np.random.Generator, shapes: Sequence[Shape]) -> str:
    """Relation of two random shapes' places, along the axis on which they are further apart."""
    first, second = (shapes[int(i)] for i in rng.choice(len(shapes), 2, replace=False))
    (x1, y1), (x2, y2) = _middle(first), _middle(second)
    if abs(x1 - x2) >= abs(y1 - y2):
        place = "to the left of" if x1 < x2 else "to the right of"
    else:
        place = "above" if y1 < y2 else "below"
    one, two = (with_article(f"{shape.colour} {NAMES[shape.category]}") for shape in (first, second))
    return f"{one} {place} {two}"


def describe(rng: np.random.Generator, scene: Scene) -> list[str]:
    """Five true sentences about a scene: what is there, how many, where, how two shapes lie, how one looks.

    Several shapes are named from left to right.
    """
    ground = with_article(scene.background)
    crowd = ""
    if scene.crowd is not None:
        crowd = f"a crowd of tiny {_plural(f'{scene.crowd.colour} {NAMES[scene.crowd.category]}')}"
    if not scene.shapes:
        there = crowd or "nothing"
        sentences = [
            f"{there} on {ground}",
            f"{ground} with {there} on it",
            f"a picture of {crowd or 'an empty ' + scene.background}",
            f"there is {there} in this picture",
            f"{ground} and {crowd or 'no shapes'}",
        ]
        return [f"{sentence[0].upper()}{sentence[1:]}." for sentence in sentences]
    # From left to right: an order that an image shows, unlike that in which its shapes were painted.
    ordered = sorted(scene.shapes, key=_middle)
    coloured = Counter(f"{shape.colour} {NAMES[shape.category]}" for shape in ordered)
    plain = Counter(NAMES[shape.category] for shape in ordered)
    shares = [shape.whole / shape.visible.size for shape in scene.shapes]
    biggest = int(np.argmax(shares))
    number = int(rng.integers(len(scene.shapes)))
    total = len(scene.shapes)
    every = _join([_counted(name, count) for name, count in plain.items()])
    listed = _join([_counted(words, count) for words, count in coloured.items()] + ([crowd] if crowd else []))
    sentences = [
        f"{listed} on {ground}",
        f"{_counted('shape', total) if total > 1 else 'one shape'}: {every}",
        f"{with_article(_details(scene.shapes[number], shares[number]))} {_where(scene.shapes[number])}",
        f"the largest shape is {with_article(_details(scene.shapes[biggest], shares[biggest]))}",
        _relation(rng, scene.shapes) if total > 1 else f"{listed} and no other shape",
    ]
    return [f"{sentence[0].upper()}{sentence[1:]}." for sentence in sentences]


def _uncompressed_rle(mask: Array) -> dict[str, Any]:
    """COCO's uncompressed run lengths: column by column, the first run counts pixels outside."""
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    return {"counts": [0, *runs] if flat[0] else runs, "size": list(mask.shape)}


def _annotate(shape: Shape, image_id: int, crowd: bool) -> dict[str, Any]:
    """A COCO instance without an id; box corners follow the polygons, or the pixels of a crowd."""
    segmentation: Any
    if crowd:
        y, x = np.nonzero(shape.visible)
        low, high = np.asarray([x.min(), y.min()]), np.asarray([x.max() + 1, y.max() + 1])
        segmentation = _uncompressed_rle(shape.visible)
    else:
        polygons = shape.segmentation()
        corners = np.concatenate(polygons)
        low, high = corners.min(axis=0), corners.max(axis=0)
        segmentation = [polygon.ravel().tolist() for polygon in polygons]
    return {
        "segmentation": segmentation,
        "area": float(shape.visible.sum()),
        "iscrowd": int(crowd),
        "image_id": image_id,
        "bbox": np.round(np.concatenate([low, high - low]), 2).astype(float).tolist(),
        "category_id": CATEGORIES[shape.category][0],
    }


def _make_image(
    index: int, folder: Path, seeds: Sequence[int], style: Style, size: tuple[int, int], most: int
) -> dict[str, Any]:
    """Draw and write one image; returns `image`, `instances` and `captions` as COCO has them, but for ids."""
    rng, (height, width) = np.random.default_rng([*seeds, index]), size
    scene = draw_scene(rng, style, height, width, max_shapes=most)
    key = 10 * index + 3 + 4 * SPLITS.index(folder.name)  # ids of the two splits never meet, and leave holes
    instances = [_annotate(shape, key, crowd=False) for shape in scene.shapes]
    if scene.crowd is not None:
        instances.append(_annotate(scene.crowd, key, crowd=True))
    image = {
        **{"license": 1, "file_name": f"{key:012d}.jpg", "coco_url": "", "height": height, "width": width},
        **{"date_captured": "2017-01-01 00:00:00", "flickr_url": "", "id": key},
    }
    Image.fromarray(scene.image).save(folder / f"{key:012d}.jpg", "JPEG", quality=JPEG_QUALITY)
    captions = [{"image_id": key, "caption": sentence} for sentence in describe(rng, scene)]
    return {"image": image, "instances": instances, "captions": captions}


def _write_annotations(
    out: Path, split: str, records: Sequence[Mapping[str, Any]], style: str, seed: int
) -> None:
    head = {
        "info": {
            **{
                "description": f"Toy shapes, style {style}, seed {seed}",
                "url": "",
                "version": "1.0",
                "year": 2017,
            },
            **{"contributor": "visft_ds", "date_created": "2017/01/01"},
        },
        "licenses": [
            {"url": "https://creativecommons.org/publicdomain/zero/1.0/", "id": 1, "name": "CC0 1.0"}
        ],
        "images": [record["image"] for record in records],
    }
    for kind in ("instances", "captions"):
        annotations = [annotation for record in records for annotation in record[kind]]
        numbered = [annotation | {"id": number} for number, annotation in enumerate(annotations, start=1)]
        content: dict[str, Any] = {**head, "annotations": numbered}
        if kind == "instances":
            content["categories"] = [{"supercategory": s, "id": i, "name": name} for i, name, s in CATEGORIES]
        (out / "annotations" / f"{kind}_{split}.json").write_bytes(orjson.dumps(content))


def write_toy_coco(
    out: Path,
    *,
    train: int,
    val: int,
    height: int,
    width: int,
    style: str = "a",
    seed: int = 0,
    max_shapes: int = MAX_SHAPES,
    colours: str = "usual",
    without: Sequence[str] = (),
    workers: int = 1,
) -> dict[str, int]:
    """Write an ordinary COCO tree to `out`: `{train,val}2017/*.jpg` and
    `annotations/{instances,captions}_*.json`.

    Returns counts (`images`, `instances`, `crowds`, `empty`). Raises ValueError for a folder that holds
    anything, sides under 28 or above 4096 pixels, an unknown style, shape or kind of colours, or numbers out
    of range.
    """
    drawn = style_of(style, colours, without)
    if not MIN_SIDE <= min(height, width) <= max(height, width) <= MAX_SIDE:
        raise ValueError(f"size {width}x{height}: sides of {MIN_SIDE} to {MAX_SIDE} pixels are drawn")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(
            f"{out} is not an empty folder and nothing is overwritten; name a new folder or remove it"
        )
    right = min(train, val, seed) >= 0 and 0 < train + val <= 10**6 and 0 < workers <= 256
    if not (right and 0 < max_shapes < len(_NUMBERS)):
        raise ValueError(
            f"train={train}, val={val}, seed={seed}, workers={workers}, max_shapes={max_shapes}: counts and seed must "
            f"not be negative, with 1 to 1,000,000 images, 256 workers and {len(_NUMBERS) - 1} shapes to an image"
        )
    number = list(STYLES).index(style) if style in STYLES else len(STYLES) + int(style)
    (out / "annotations").mkdir(parents=True, exist_ok=True)
    everything: list[dict[str, Any]] = []
    for split, count in zip(SPLITS, (train, val), strict=True):
        (out / split).mkdir()
        seeds = (seed, number, SPLITS.index(split))
        save = partial(
            _make_image, folder=out / split, seeds=seeds, style=drawn, size=(height, width), most=max_shapes
        )
        if workers == 1:
            records = [save(index) for index in range(count)]
        else:
            with _pool(workers) as pool:
                records = pool.map(save, range(count), chunksize=16)
        _write_annotations(out, split, records, style, seed)
        everything += records
    instances = [instance for record in everything for instance in record["instances"]]
    return {
        "images": len(everything),
        "instances": len(instances),
        "crowds": sum(instance["iscrowd"] for instance in instances),
        "empty": sum(not record["instances"] for record in everything),
    }


def _pool(workers: int) -> Pool:
    """Processes that are deaf to a Ctrl-C, which reaches all of a terminal's: this one ends them, without
    tracebacks.

    Ignored signals stay so in processes that are started, from their first instruction on.
    """
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return multiprocessing.get_context("spawn").Pool(workers)
    finally:
        signal.signal(signal.SIGINT, handler)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = Parser(
        prog=program("toy"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="a new or empty folder")
    add("--train", type=int, default=2000, metavar="N", help="images in train2017 (default %(default)s)")
    add("--val", type=int, default=200, metavar="N", help="images in val2017 (default %(default)s)")
    add("--size", type=_size, default=(112, 112), metavar="WxH", help="pixels, or one side (default 112)")
    add(
        "--style",
        default="a",
        metavar="a|b|N",
        help="b has other colours and textures; a number draws a style",
    )
    add(
        "--colours",
        choices=COLOURS,
        default="usual",
        help="even: any shape in any colour, so colours tell nothing",
    )
    add(
        "--without",
        type=lambda names: names.split(","),
        default=(),
        metavar="A,B",
        help="shapes to leave out",
    )
    add(
        "--max-shapes",
        type=int,
        default=MAX_SHAPES,
        metavar="N",
        help="most per image (3); 18 give COCO's mean, 7",
    )
    add("--seed", type=int, default=0, metavar="N", help="random seed (default %(default)s)")
    add(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="processes (default: one per core)",
    )
    given = vars(parser.parse_args(arguments))
    width, height = given.pop("size")
    try:
        counts = write_toy_coco(**given, width=width, height=height)
    except (ValueError, OSError) as error:
        return tell(error, "toy")
    print(
        f"{given['out']}: {counts['images']} images ({counts['empty']} empty), {counts['instances']} instances "
        f"({counts['crowds']} crowds), style {given['style']}, {width}x{height}"
    )
    return 0


def _size(text: str) -> tuple[int, int]:
    """(width, height) of `160x112`, or of `112` for a square."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a size; write 112 or 160x112 (width x height, pixels)"
        )
    return int(match[1]), int(match[2] or match[1])
