"""Pictures of what a head predicts, beside the ground truth.

Pictures are (H, W, 3) uint8 RGB arrays; boxes are (x, y, w, h) in pixels of the given image, as COCO stores them.
"""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

Picture = npt.NDArray[np.uint8]
Colour = tuple[int, int, int]
Rectangle = tuple[float, float, float, float]  # x0, y0, x1, y1

_PAPER: Colour = (250, 250, 248)
_INK: Colour = (45, 45, 48)
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
    assert image.dtype == np.uint8 and image.ndim == 3, (image.dtype, image.shape)
    scale = side / max(image.shape[:2])
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    base = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
    known = palette(sorted({*true_names, *names})) if colours is None else colours
    # the surest prediction last, on top of the others
    shown = [place for place in np.argsort(scores, kind="stable").tolist() if scores[place] >= threshold]
    truth = _panel(base, f"ground truth: {len(true_boxes)}", true_boxes, true_names, list(true_names), known, scale)
    prediction = _panel(
        base,
        f"predicted, score from {threshold:.2f}: {len(shown)}",
        [boxes[place] for place in shown],
        [names[place] for place in shown],
        [f"{names[place]} {scores[place]:.2f}" for place in shown],
        known,
        scale,
    )
    return _side_by_side([truth, prediction])


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
    sheet = _paper(sum(heights) + _GAP, len(rows[0]) * width + _GAP)
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


def _panel(
    base: Image.Image,
    title: str,
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
        _draw_tag(draw, tag, corner, colours[name], base.size, taken)
    return _with_title(np.asarray(canvas), title)


def _draw_tag(
    draw: ImageDraw.ImageDraw, tag: str, box: Rectangle, colour: Colour, size: tuple[int, int], taken: list[Rectangle]
) -> None:
    """Write a tag where no earlier tag is: above its box, inside, below, the same at the right edge, else near."""
    font = ImageFont.load_default(_TAG_SIZE)
    width, height = draw.textlength(tag, font=font) + 8, _TAG_SIZE + 5
    lefts = [min(max(x, 0), max(size[0] - width, 0)) for x in (box[0], box[2] - width)]
    tops = [box[1] - height, box[1], box[3], *(box[1] + step * height for step in (-2, 1, 2, -3, 3, 4))]
    tops = [min(max(top, 0), max(size[1] - height, 0)) for top in tops]
    corners = [(left, top) for some in (tops[:3], tops[3:]) for left in lefts for top in some]
    places = [(left, top, left + width, top + height) for left, top in corners]
    place = next((p for p in places if not any(_overlap(p, other) for other in taken)), places[0])
    taken.append(place)
    draw.rectangle(place, fill=colour)
    # ITU-R BT.601 luma decides whether dark or light letters can be read on the colour
    bright = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 140
    middle = (place[1] + place[3]) / 2
    draw.text((place[0] + 4, middle), tag, fill=(0, 0, 0) if bright else (255, 255, 255), font=font, anchor="lm")


def _clip(box: Rectangle, size: tuple[int, int]) -> Rectangle:
    """The part of a box that lies on the canvas, at least one pixel of it, corners in order."""
    x0, x1 = (min(max(x, 0), size[0] - 1) for x in (box[0], box[2]))
    y0, y1 = (min(max(y, 0), size[1] - 1) for y in (box[1], box[3]))
    return (x0, y0, max(x0, x1), max(y0, y1))


def _overlap(first: Rectangle, second: Rectangle) -> bool:
    return first[0] < second[2] and second[0] < first[2] and first[1] < second[3] and second[1] < first[3]


def _with_title(picture: Picture, title: str) -> Picture:
    strip = Image.fromarray(_paper(_TITLE_HEIGHT, picture.shape[1]))
    font = ImageFont.load_default(_TITLE_SIZE)
    ImageDraw.Draw(strip).text((2, _TITLE_HEIGHT / 2), title, fill=_INK, font=font, anchor="lm")
    return np.concatenate([np.asarray(strip), picture])


def _side_by_side(pictures: Sequence[Picture]) -> Picture:
    gap = _paper(pictures[0].shape[0], _GAP)
    return np.concatenate([pictures[0], gap, *pictures[1:]], axis=1)


def _paper(height: int, width: int) -> Picture:
    return np.full((height, width, 3), _PAPER, dtype=np.uint8)
