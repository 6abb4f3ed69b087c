"""Pictures of a head's predictions next to the ground truth.

Pictures are (H, W, 3) uint8 RGB arrays; boxes are (x, y, w, h) in pixels of the given image, as COCO stores them.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

Picture = npt.NDArray[np.uint8]
Colour = tuple[int, int, int]
Rectangle = tuple[float, float, float, float]  # x0, y0, x1, y1

_PAPER: Colour = (250, 250, 248)
INK: Colour = (45, 45, 48)
_GAP = 12  # between panels and pictures, pixels
_TITLE_HEIGHT = 26
_TITLE_SIZE = 17
_TAG_SIZE = 14


def palette(names: Sequence[str]) -> dict[str, Colour]:
    """A colour for each category name; neighbours in the sequence differ most.

    Give all names of a data set, so that a category has one colour in all pictures.
    """
    colours = {}
    for place, name in enumerate(dict.fromkeys(names)):
        # Twelve even hues, five steps apart from name to name; the next dozen darker; after three dozens the circle is
        # turned by a part of a step.
        dozen, step = divmod(place, 12)
        hue = (step * 5 + (dozen // 3 * 0.381966) % 1.0) / 12 % 1.0
        red, green, blue = colorsys.hsv_to_rgb(hue, 0.85, (1.0, 0.75, 0.5)[dozen % 3])
        colours[name] = (round(red * 255), round(green * 255), round(blue * 255))
    return colours


def draw_detections(
    image: Picture,
    true_boxes: Sequence[Sequence[float]],
    true_names: Sequence[str],
    boxes: Sequence[Sequence[float]],
    names: Sequence[str],
    scores: Sequence[float],
    *,
    threshold: float = 0.5,
    colours: Mapping[str, Colour] | None = None,
    side: int = 448,
) -> Picture:
    """Ground truth on the left, predictions with a score of at least `threshold` on the right.

    The image is scaled until its longer side has `side` pixels, so that names are readable on small images too.
    `colours` gives a colour for each name (see `palette`); by default the names of this picture get their own.
    """
    known = palette(sorted({*true_names, *names})) if colours is None else colours
    scale = side / max(image.shape[:2])
    truth = _with_boxes(scaled(image, side), true_boxes, true_names, list(true_names), known, scale)
    prediction, count = predicted_boxes(image, boxes, names, scores, threshold=threshold, colours=known, side=side)
    return side_by_side(
        (truth, f"ground truth: {len(true_boxes)}"), (prediction, f"predicted, score from {threshold:.2f}: {count}")
    )


def predicted_boxes(
    image: Picture,
    boxes: Sequence[Sequence[float]],
    names: Sequence[str],
    scores: Sequence[float],
    *,
    threshold: float,
    colours: Mapping[str, Colour],
    side: int,
) -> tuple[Picture, int]:
    """The scaled image with the boxes that have a score of at least `threshold`, and how many those are."""
    # the surest prediction last, on top of the others
    shown = [place for place in np.argsort(scores, kind="stable").tolist() if scores[place] >= threshold]
    picture = _with_boxes(
        scaled(image, side),
        [boxes[place] for place in shown],
        [names[place] for place in shown],
        [f"{names[place]} {scores[place]:.2f}" for place in shown],
        colours,
        side / max(image.shape[:2]),
    )
    return picture, len(shown)


def split_panels(picture: Picture) -> tuple[Picture, Picture]:
    """The ground truth and the prediction, each with its title, out of a picture that a draw_... function made."""
    width, odd = divmod(picture.shape[1] - _GAP, 2)
    if width < 1 or odd:
        raise ValueError(f"a picture {picture.shape[1]} pixels wide does not consist of two panels")
    return picture[:, :width], picture[:, width + _GAP :]


def grid(pictures: Sequence[Picture], *, columns: int = 2) -> Picture:
    """Pictures in rows of `columns`; a row is as high as its highest picture, all columns are equally wide."""
    if not pictures or columns < 1:
        raise ValueError(f"a grid needs pictures and columns, not {len(pictures)} pictures in {columns} columns")
    width = max(picture.shape[1] for picture in pictures) + _GAP
    rows = [pictures[start : start + columns] for start in range(0, len(pictures), columns)]
    heights = [max(picture.shape[0] for picture in row) + _GAP for row in rows]
    sheet = paper(sum(heights) + _GAP, len(rows[0]) * width + _GAP)
    top = _GAP
    for row, height in zip(rows, heights, strict=True):
        for place, picture in enumerate(row):
            left = _GAP + place * width
            sheet[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
        top += height
    return sheet


def save_png(picture: Picture, path: Path) -> None:
    """Write a picture, making its folder if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The strongest compression costs twenty times as long and saves a tenth.
    Image.fromarray(picture).save(path, format="PNG", compress_level=4)


def scaled(image: Picture, side: int) -> Image.Image:
    """The image with its longer side at `side` pixels, the shorter in proportion and at least one pixel."""
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3, (image.dtype, image.shape)
    scale = side / max(image.shape[:2])
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    # The shortcut for images much larger than wanted cannot be seen and saves most of the time.
    return Image.fromarray(image).resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)


def side_by_side(*panels: tuple[Picture, str]) -> Picture:
    """Pictures beside each other, each below its title, filled up with paper to one size in which the titles fit."""
    font = letters(_TITLE_SIZE)
    height = max(picture.shape[0] for picture, _ in panels)
    width = max(max(picture.shape[1], math.ceil(font.getlength(title)) + 4) for picture, title in panels)
    parts: list[Picture] = []
    for picture, title in panels:
        panel = paper(_TITLE_HEIGHT + height, width)
        panel[_TITLE_HEIGHT : _TITLE_HEIGHT + picture.shape[0], : picture.shape[1]] = picture
        canvas = Image.fromarray(panel)
        ImageDraw.Draw(canvas).text((2, _TITLE_HEIGHT / 2), title, fill=INK, font=font, anchor="lm")
        if parts:
            parts.append(paper(panel.shape[0], _GAP))
        parts.append(np.asarray(canvas))
    return np.concatenate(parts, axis=1)


def draw_tag(draw: ImageDraw.ImageDraw, tag: str, place: Rectangle, colour: Colour) -> None:
    """Write a tag on a ground of the given colour; `place` has the size that `tag_size` says."""
    draw.rectangle(place, fill=colour)
    # ITU-R BT.601 luma decides whether dark or light letters can be read on the colour
    bright = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 140
    middle = (place[1] + place[3]) / 2
    ink = (0, 0, 0) if bright else (255, 255, 255)
    draw.text((place[0] + 4, middle), tag, fill=ink, font=letters(_TAG_SIZE), anchor="lm")


def tag_size(tag: str) -> tuple[float, float]:
    """Width and height of a tag, pixels."""
    return letters(_TAG_SIZE).getlength(tag) + 8, _TAG_SIZE + 5


def tag_places(tag: str, box: Rectangle, size: tuple[int, int]) -> list[Rectangle]:
    """Candidate places for the tag of a box on a canvas of `size` (width, height), best first.

    Above the box, inside, below, the same at the right edge, else near.
    """
    width, height = tag_size(tag)
    lefts = [min(max(x, 0), max(size[0] - width, 0)) for x in (box[0], box[2] - width)]
    tops = [box[1] - height, box[1], box[3], *(box[1] + step * height for step in (-2, 1, 2, -3, 3, 4))]
    tops = [min(max(top, 0), max(size[1] - height, 0)) for top in tops]
    corners = [(left, top) for some in (tops[:3], tops[3:]) for left in lefts for top in some]
    return [(left, top, left + width, top + height) for left, top in corners]


def free_place(places: Sequence[Rectangle], taken: Sequence[Rectangle]) -> Rectangle | None:
    """The first of the places that overlaps nothing taken."""
    return next((place for place in places if not any(_overlap(place, other) for other in taken)), None)


@cache
def letters(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font of all pictures; comes with Pillow, so that they look alike everywhere."""
    return ImageFont.load_default(size)


def paper(height: int, width: int) -> Picture:
    """An empty sheet."""
    return np.full((height, width, 3), _PAPER, dtype=np.uint8)


def _with_boxes(
    base: Image.Image,
    boxes: Sequence[Sequence[float]],
    names: Sequence[str],
    tags: Sequence[str],
    colours: Mapping[str, Colour],
    scale: float,
) -> Picture:
    canvas = base.copy()
    draw = ImageDraw.Draw(canvas)
    line = max(2, round(max(base.size) / 180))
    corners = [_clip((x * scale, y * scale, (x + w) * scale, (y + h) * scale), base.size) for x, y, w, h in boxes]
    for corner, name in zip(corners, names, strict=True):
        draw.rectangle(corner, outline=colours[name], width=line)
    taken: list[Rectangle] = []
    # the surest tag is placed first and gets the best place
    for corner, name, tag in reversed(list(zip(corners, names, tags, strict=True))):
        places = tag_places(tag, corner, base.size)
        taken.append(free_place(places, taken) or places[0])
        draw_tag(draw, tag, taken[-1], colours[name])
    return np.asarray(canvas)


def _clip(box: Rectangle, size: tuple[int, int]) -> Rectangle:
    """The part of a box that lies on the canvas, at least one pixel of it, corners in order."""
    x0, x1 = (min(max(x, 0), size[0] - 1) for x in (box[0], box[2]))
    y0, y1 = (min(max(y, 0), size[1] - 1) for y in (box[1], box[3]))
    return (x0, y0, max(x0, x1), max(y0, y1))


def _overlap(first: Rectangle, second: Rectangle) -> bool:
    return first[0] < second[2] and second[0] < first[2] and first[1] < second[3] and second[1] < first[3]
