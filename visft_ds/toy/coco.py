"""`visft toy`: a toy data set in COCO's own form: images of shapes with polygons, RLE crowds and five
captions each; and questions with true answers in VQAv2's form.

    visft toy --out toy --train 2000 --val 200 --size 112
    visft toy --out toy_b --train 0 --val 200 --size 160x112 --style b --colours even
    visft toy --out toy_17 --style 17               # colours, textures and noise drawn by a number
    visft toy --out rooms --depth --size 160x120    # ray-traced rooms, with depth/ besides

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
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from PIL import Image

from visft_ds.data.depth import encoded
from visft_ds.data.masks import png_of
from visft_ds.data.panoptic import png_of_numbers
from visft_ds.data.workers import kill_pool
from visft_ds.errors import tell
from visft_ds.flags import command_parser
from visft_ds.toy import rooms
from visft_ds.toy.patterns import Array
from visft_ds.toy.questions import ask, entries, with_article
from visft_ds.toy.scenes import MAX_SHAPES, Scene, Shape, draw_scene
from visft_ds.toy.shapes import CATEGORY_IDS
from visft_ds.toy.styles import OWN_COLOUR, STYLES, Style, style_of

SPLITS = ("train2017", "val2017")
MIN_SIDE = 28
MAX_SIDE = 4096
JPEG_QUALITY = 92
#: Ids of the categories of drawings and of rooms, by name.
_IDS = {**CATEGORY_IDS, **rooms.CATEGORY_IDS, **rooms.STUFF_IDS}
_NUMBERS = (
    *("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
    *("nineteen", "twenty"),
)


def _join(words: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    if len(words) == 1:
        return words[0]
    return f"{', '.join(words[:-1])} and {words[-1]}"


def _plural(words: str) -> str:
    """`red stars` of `red star`: the last word is the noun."""
    return f"{words}es" if words.endswith("s") else f"{words}s"


def _counted(words: str, count: int) -> str:
    """`a red star`, `two red stars`."""
    return with_article(words) if count == 1 else f"{_NUMBERS[count]} {_plural(words)}"


def _sentence(words: str) -> str:
    return f"{words[0].upper()}{words[1:]}."


def _coloured(shape: Shape) -> str:
    """`red star`."""
    return f"{shape.colour} {shape.category}"


def _where(shape: Shape) -> str:
    """`in the top left corner`, `on the left`, `in the middle`."""
    x, y = shape.middle
    column = ""
    if x < 0.38:
        column = "left"
    elif x > 0.62:
        column = "right"
    row = ""
    if y < 0.38:
        row = "top"
    elif y > 0.62:
        row = "bottom"
    if row and column:
        return f"in the {row} {column} corner"
    if row:
        return f"at the {row}"
    if column:
        return f"on the {column}"
    return "in the middle"


def _share(shape: Shape) -> float:
    """Part of the image's pixels that a shape has, were nothing painted over it."""
    return shape.pixels / shape.visible.size


def _details(shape: Shape) -> str:
    """`a large striped red star`: size, texture, colour and name of a shape."""
    words = [_coloured(shape)]
    if shape.texture != "plain":
        words.insert(0, shape.texture)
    if _share(shape) > 0.11:
        words.insert(0, "large")
    elif _share(shape) < 0.045:
        words.insert(0, "small")
    return with_article(" ".join(words))


def _relation(rng: np.random.Generator, shapes: Sequence[Shape]) -> str:
    """Relation of two random shapes' places, along the axis on which they are further apart."""
    first, second = (shapes[number] for number in rng.choice(len(shapes), 2, replace=False))
    x1, y1 = first.middle
    x2, y2 = second.middle
    if abs(x1 - x2) >= abs(y1 - y2):
        relation = "to the left of" if x1 < x2 else "to the right of"
    else:
        relation = "above" if y1 < y2 else "below"
    return f"{with_article(_coloured(first))} {relation} {with_article(_coloured(second))}"


def describe(rng: np.random.Generator, scene: Scene) -> list[str]:
    """Five true sentences about a scene: what is there, how many, where, how two shapes lie, how one looks.

    Several shapes are named from left to right.
    """
    crowd = ""
    if scene.crowd is not None:
        crowd = f"a crowd of tiny {_plural(_coloured(scene.crowd))}"
    sentences = _about_shapes(rng, scene, crowd) if scene.shapes else _about_no_shapes(scene, crowd)
    return [_sentence(words) for words in sentences]


def _about_no_shapes(scene: Scene, crowd: str) -> list[str]:
    background = with_article(scene.background)
    there = crowd or "nothing"
    return [
        f"{there} on {background}",
        f"{background} with {there} on it",
        f"a picture of {crowd or 'an empty ' + scene.background}",
        f"there is {there} in this picture",
        f"{background} and {crowd or 'no shapes'}",
    ]


def _about_shapes(rng: np.random.Generator, scene: Scene, crowd: str) -> list[str]:
    shapes = scene.shapes
    total = len(shapes)
    # From left to right: an order that an image shows, unlike that in which its shapes were painted.
    ordered = sorted(shapes, key=lambda shape: shape.middle)
    by_name = Counter(shape.category for shape in ordered)
    by_colour = Counter(map(_coloured, ordered))
    listed = [_counted(words, count) for words, count in by_colour.items()]
    if crowd:
        listed.append(crowd)
    every = _join(listed)
    named = _join([_counted(name, count) for name, count in by_name.items()])
    random_shape = shapes[rng.integers(total)]
    largest = max(shapes, key=_share)
    if total > 1:
        how_many = _counted("shape", total)
        relation = _relation(rng, shapes)
    else:
        how_many = "one shape"
        relation = f"{every} and no other shape"
    return [
        f"{every} on {with_article(scene.background)}",
        f"{how_many}: {named}",
        f"{_details(random_shape)} {_where(random_shape)}",
        f"the largest shape is {_details(largest)}",
        relation,
    ]


def _run_lengths(mask: Array) -> dict[str, Any]:
    """COCO's uncompressed run-length code: column by column, the first run counts pixels outside."""
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    if flat[0]:
        runs.insert(0, 0)
    return {"counts": runs, "size": list(mask.shape)}


def _annotate(shape: Shape, image_id: int, crowd: bool) -> dict[str, Any]:
    """A COCO annotation without an id: polygons and their box of a shape that is whole, else the visible
    pixels and theirs.
    """
    segmentation: Any
    if shape.polygons and shape.is_whole() and not crowd:
        segmentation = [polygon.ravel().tolist() for polygon in shape.polygons]
        corners = np.concatenate(shape.polygons)
        low = corners.min(axis=0)
        high = corners.max(axis=0)
    else:
        segmentation = _run_lengths(shape.visible)
        y, x = np.nonzero(shape.visible)
        low = np.array([x.min(), y.min()])
        high = np.array([x.max(), y.max()]) + 1
    return {
        "segmentation": segmentation,
        "area": float(shape.visible.sum()),
        "iscrowd": int(crowd),
        "image_id": image_id,
        "bbox": np.round(np.concatenate([low, high - low]), 2).astype(float).tolist(),
        "category_id": _IDS[shape.category],
    }


def _make_image(
    index: int,
    folder: Path,
    seeds: Sequence[int],
    style: Style,
    size: tuple[int, int],
    max_shapes: int,
    depth: bool,
    panoptic: bool,
) -> dict[str, Any]:
    """Draw and write one image; returns `image`, `instances`, `captions` and `panoptic` as COCO has them, but
    for ids, and `questions` with `answers`.
    """
    rng = np.random.default_rng([*seeds, index])
    height, width = size
    image_id = 10 * index + 3 + 4 * SPLITS.index(folder.name)  # the splits never share one, and leave holes
    name = f"{image_id:012d}.jpg"
    segments = []
    asked = []
    if depth:
        room = rooms.draw_room(rng, height, width)
        scene = room.scene
        path = folder.parent / "depth" / folder.name / f"{image_id:012d}.png"
        path.write_bytes(png_of(encoded(room.depth)))
        if panoptic:
            path = folder.parent / "annotations" / f"panoptic_{folder.name}" / path.name
            segments.append(_write_panoptic(path, room, image_id))
    else:
        scene = draw_scene(rng, style, height, width, max_shapes=max_shapes)
        asked = ask(np.random.default_rng([*seeds, index, 1]), scene, style)
    Image.fromarray(scene.image).save(folder / name, "JPEG", quality=JPEG_QUALITY)
    instances = [_annotate(shape, image_id, crowd=False) for shape in scene.shapes]
    if scene.crowd is not None:
        instances.append(_annotate(scene.crowd, image_id, crowd=True))
    captions = [{"image_id": image_id, "caption": sentence} for sentence in describe(rng, scene)]
    image = {"license": 1, "file_name": name, "height": height, "width": width, "id": image_id}
    questions, answers = entries(image_id, asked)
    return {
        "image": image,
        "instances": instances,
        "captions": captions,
        "panoptic": segments,
        "questions": questions,
        "answers": answers,
    }


def _write_panoptic(path: Path, room: rooms.Room, image_id: int) -> dict[str, Any]:
    """Write the panoptic map of a room; returns its annotation as COCO has it. Walls are one segment."""
    numbers = room.numbers.copy()
    numbers[np.isin(numbers, rooms.WALLS)] = rooms.WALLS[0]
    path.write_bytes(png_of_numbers(numbers))
    segments = []
    for number in np.unique(numbers).tolist():
        category = _IDS[room.categories[number - 1]]
        area = int((numbers == number).sum())
        segments.append({"id": number, "category_id": category, "iscrowd": 0, "area": area})
    return {"image_id": image_id, "file_name": path.name, "segments_info": segments}


def _write_annotations(
    folder: Path,
    split: str,
    records: Sequence[Mapping[str, Any]],
    description: str,
    ids: Mapping[str, int],
    panoptic: bool,
) -> None:
    """Write instances_SPLIT.json and captions_SPLIT.json, and panoptic_SPLIT.json if asked for."""
    license_ = {"url": "https://creativecommons.org/publicdomain/zero/1.0/", "id": 1, "name": "CC0 1.0"}
    categories = [{"id": number, "name": name} for name, number in ids.items()]
    kinds = ["instances", "captions"]
    if panoptic:
        kinds.append("panoptic")
    for kind in kinds:
        annotations = [annotation for record in records for annotation in record[kind]]
        content: dict[str, Any] = {
            "info": {"description": description},
            "licenses": [license_],
            "images": [record["image"] for record in records],
            "annotations": [{**each, "id": number} for number, each in enumerate(annotations, 1)],
        }
        if kind == "instances":
            content["categories"] = categories
        if kind == "panoptic":
            content["categories"] = [{**category, "isthing": 1} for category in categories]
            for name, number in rooms.STUFF_IDS.items():
                content["categories"].append({"id": number, "name": name, "isthing": 0})
        (folder / f"{kind}_{split}.json").write_bytes(orjson.dumps(content))


def _write_questions(folder: Path, split: str, records: Sequence[Mapping[str, Any]]) -> None:
    """Write OpenEnded_toy_SPLIT_questions.json and toy_SPLIT_annotations.json, as VQAv2 has them."""
    questions = {"questions": [entry for record in records for entry in record["questions"]]}
    (folder / f"OpenEnded_toy_{split}_questions.json").write_bytes(orjson.dumps(questions))
    answers = {"annotations": [entry for record in records for entry in record["answers"]]}
    (folder / f"toy_{split}_annotations.json").write_bytes(orjson.dumps(answers))


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
    depth: bool = False,
    panoptic: bool = False,
    workers: int = 1,
) -> dict[str, int]:
    """Write an ordinary COCO tree to `out`: `{train,val}2017/*.jpg` and
    `annotations/{instances,captions}_*.json`; beside it `questions/`, or with `depth` of ray-traced rooms
    `depth/{train,val}2017`, and with `panoptic` also `annotations/panoptic_*.json`.

    Returns counts (`images`, `instances`, `crowds`, `empty`). Raises ValueError for a folder that holds
    anything, sides under 28 or above 4096 pixels, an unknown style or shape, numbers out of range, or
    `panoptic` without `depth`.
    """
    if panoptic and not depth:
        raise ValueError("--panoptic is for rooms: give --depth as well")
    family = style_of(style, colours, without)
    if not MIN_SIDE <= min(height, width) <= max(height, width) <= MAX_SIDE:
        raise ValueError(f"size {width}x{height}: sides of {MIN_SIDE} to {MAX_SIDE} pixels are drawn")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(
            f"{out} is not an empty folder and nothing is overwritten; name a new folder or remove it"
        )
    if min(train, val, seed) < 0 or train + val == 0 or workers < 1:
        numbers = f"train={train}, val={val}, seed={seed}, workers={workers}"
        raise ValueError(f"{numbers}: no number may be negative; one image and one worker are needed")
    if not 0 < max_shapes < len(_NUMBERS):
        raise ValueError(f"max_shapes={max_shapes}: 1 to {len(_NUMBERS) - 1} shapes to an image are drawn")
    style_number = list(STYLES).index(style) if style in STYLES else len(STYLES) + int(style)
    for folder in ("annotations", "questions"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    every_record = list[dict[str, Any]]()
    for split, count in zip(SPLITS, (train, val), strict=True):
        (out / split).mkdir()
        if depth:
            (out / "depth" / split).mkdir(parents=True)
        if panoptic:
            (out / "annotations" / f"panoptic_{split}").mkdir()
        draw = partial(
            _make_image,
            folder=out / split,
            seeds=(seed, style_number, SPLITS.index(split)),
            style=family,
            size=(height, width),
            max_shapes=max_shapes,
            depth=depth,
            panoptic=panoptic,
        )
        alone = workers == 1
        records = list(map(draw, range(count))) if alone else _draw_beside(draw, count, workers)
        description = f"Toy rooms, seed {seed}" if depth else f"Toy shapes, style {style}, seed {seed}"
        ids = rooms.CATEGORY_IDS if depth else CATEGORY_IDS
        _write_annotations(out / "annotations", split, records, description, ids, panoptic)
        if not depth:
            _write_questions(out / "questions", split, records)
        every_record += records
    instances = [instance for record in every_record for instance in record["instances"]]
    return {
        "images": len(every_record),
        "instances": len(instances),
        "crowds": sum(instance["iscrowd"] for instance in instances),
        "empty": sum(not record["instances"] for record in every_record),
    }


def _draw_beside(draw: Callable[[int], dict[str, Any]], count: int, workers: int) -> list[dict[str, Any]]:
    """Records of all images, by processes that are deaf to a Ctrl-C: it reaches all of a terminal's, and this
    one ends them, without tracebacks.

    Raises:
        RuntimeError: A worker ended, as where a script without a guard is imported by its own workers.
    """
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        # Ignored signals stay so in processes that are started, from their first instruction on.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            records = pool.map(draw, range(count), chunksize=16)
        finally:
            signal.signal(signal.SIGINT, handler)
        return list(records)
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a worker ended before its pictures were drawn: where a script calls this, let it do so below "
            '`if __name__ == "__main__":`, or with workers=1'
        ) from error
    finally:
        kill_pool(pool)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = command_parser("toy", __doc__)
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
        choices=OWN_COLOUR,
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
    add(
        "--depth",
        action="store_true",
        help="ray-traced rooms with spheres and boxes instead, and exact depth in depth/",
    )
    add(
        "--panoptic",
        action="store_true",
        help="with --depth: panoptic maps of objects, floor, ceiling and walls, as COCO has them",
    )
    add("--seed", type=int, default=0, metavar="N", help="random seed (default %(default)s)")
    add(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="processes (default: one per core)",
    )
    options = vars(parser.parse_args(arguments))
    width, height = options.pop("size")
    try:
        counts = write_toy_coco(**options, width=width, height=height)
    except (ValueError, OSError) as error:
        return tell(error, "toy")
    images = f"{counts['images']} images ({counts['empty']} empty)"
    instances = f"{counts['instances']} instances ({counts['crowds']} crowds)"
    print(f"{options['out']}: {images}, {instances}, style {options['style']}, {width}x{height}")
    return 0


def _size(text: str) -> tuple[int, int]:
    """(width, height) of `160x112`, or of `112` for a square."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a size; write 112 or 160x112 (width x height, pixels)"
        )
    return int(match[1]), int(match[2] or match[1])
