"""Pictures of predictions beside the truth: (H, W, 3) uint8 RGB arrays; boxes are x y w h in pixels, as in
COCO.
"""

from __future__ import annotations

import colorsys
import textwrap
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

Picture = npt.NDArray[np.uint8]
Colour = tuple[int, int, int]
_PAPER: Colour = (250, 250, 248)
INK: Colour = (45, 45, 48)
SIDE = 448  #: of the longer side of an image in a picture, pixels
_GAP, _TITLE, TEXT = 12, 17, 14  # between panels; sizes of letters, pixels
_OPACITY = 0.5  # of a mask


def palette(names: Sequence[str]) -> dict[str, Colour]:
    """A colour for each category name: twelve hues, five steps apart from name to name; the next dozen
    darker.

    Give all names of a data set, so that a category has one colour in all pictures.
    """
    found = {}
    for place, name in enumerate(dict.fromkeys(names)):
        dozen, step = divmod(place, 12)
        rgb = colorsys.hsv_to_rgb(step * 5 / 12 % 1, 0.85, (1.0, 0.75, 0.5)[dozen % 3])
        found[name] = (round(rgb[0] * 255), round(rgb[1] * 255), round(rgb[2] * 255))
    return found


def draw_objects(
    image: Picture,
    names: Sequence[str],
    tags: Sequence[str],
    colours: Mapping[str, Colour],
    *,
    boxes: Sequence[Sequence[float]] = (),
    masks: Sequence[npt.NDArray[np.bool_]] | None = None,
    side: int = SIDE,
) -> Picture:
    """The scaled image with boxes (n, 4), or masks (n, H, W), and a tag for each; the first ones lie on top.

    A tag stands at the corner of its box; of masks these are the boxes around them where none are given.
    """
    base = np.asarray(scaled(image, side), dtype=np.float32).copy()
    scale, line = side / max(image.shape[:2]), max(2, side // 180)
    if masks is not None:
        edges = [Image.fromarray(mask).getbbox() or (0, 0, 0, 0) for mask in masks]
        boxes = boxes or [(left, top, right - left, bottom - top) for left, top, right, bottom in edges]
        for mask, name in reversed(list(zip(masks, names, strict=True))):
            inside = np.asarray(Image.fromarray(mask).resize((base.shape[1], base.shape[0])), dtype=bool)
            base[inside] = base[inside] * (1 - _OPACITY) + np.array(colours[name]) * _OPACITY
    canvas = Image.fromarray(base.round().astype(np.uint8))
    draw = ImageDraw.Draw(canvas)
    for (x, y, w, h), name, tag in reversed(list(zip(boxes, names, tags, strict=True))):
        if not tag:
            continue
        left, right = (min(max(end * scale, 0), canvas.width - 1) for end in (x, x + max(w, 0)))
        top, bottom = (min(max(end * scale, 0), canvas.height - 1) for end in (y, y + max(h, 0)))
        if masks is None:
            draw.rectangle((left, top, right, bottom), outline=colours[name], width=line)
        place = draw.textbbox((left + line + 1, top), tag, font=letters(TEXT))
        moved = min(0.0, canvas.width - place[2] - 2)  # a tag at the right border begins further left
        draw.rectangle(
            (place[0] + moved - 2, place[1] - 1, place[2] + moved + 2, place[3] + 1), fill=colours[name]
        )
        # ITU-R BT.601 luma decides whether dark or light letters can be read on the colour
        bright = float(np.dot(colours[name], (0.299, 0.587, 0.114))) > 140
        ink = (0, 0, 0) if bright else (255, 255, 255)
        draw.text((left + line + 1 + moved, top), tag, fill=ink, font=letters(TEXT))
    return np.asarray(canvas)


def with_text(image: Picture, lines: Sequence[str], side: int = SIDE) -> Picture:
    """The scaled image above some lines of text, each wrapped to the width and cut off after four."""
    base = np.asarray(scaled(image, side))
    signs = max(8, int(side / letters(TEXT).getlength("n")))
    text = "\n".join(textwrap.fill(line, signs, max_lines=4, placeholder=" …") for line in lines)
    sheet = paper(base.shape[0] + (text.count("\n") + 2) * (TEXT + 5), max(side, base.shape[1]))
    sheet[: base.shape[0], : base.shape[1]] = base
    canvas = Image.fromarray(sheet)
    ImageDraw.Draw(canvas).multiline_text((3, base.shape[0] + 4), text, fill=INK, font=letters(TEXT))
    return np.asarray(canvas)


def side_by_side(*panels: tuple[Picture, str]) -> Picture:
    """Pictures beside each other, each below its title, filled up with paper to one size in which the titles
    fit.
    """
    height = max(picture.shape[0] for picture, _ in panels)
    width = max(max(picture.shape[1], int(letters(_TITLE).getlength(title)) + 5) for picture, title in panels)
    sheet = paper(height + _TITLE + 9, len(panels) * (width + _GAP) - _GAP)
    for place, (picture, _) in enumerate(panels):
        left = place * (width + _GAP)
        sheet[_TITLE + 9 : _TITLE + 9 + picture.shape[0], left : left + picture.shape[1]] = picture
    canvas = Image.fromarray(sheet)
    for place, (_, title) in enumerate(panels):
        ImageDraw.Draw(canvas).text((place * (width + _GAP) + 2, 3), title, fill=INK, font=letters(_TITLE))
    return np.asarray(canvas)


def split_panels(picture: Picture) -> tuple[Picture, Picture]:
    """The two panels of a picture by `side_by_side`, each with its title."""
    width = (picture.shape[1] - _GAP) // 2
    return picture[:, :width], picture[:, width + _GAP :]


def grid(pictures: Sequence[Picture], *, columns: int = 2) -> Picture:
    """Pictures in rows of `columns`; a row is as high as its highest picture, all columns are equally
    wide.
    """
    rows = [pictures[start : start + columns] for start in range(0, len(pictures), columns)]
    heights = [max(picture.shape[0] for picture in row) + _GAP for row in rows]
    width = max(picture.shape[1] for picture in pictures) + _GAP
    sheet, top = paper(sum(heights) + _GAP, min(columns, len(pictures)) * width + _GAP), _GAP
    for row, height in zip(rows, heights, strict=True):
        for place, picture in enumerate(row):
            left = _GAP + place * width
            sheet[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
        top += height
    return sheet


def scaled(image: Picture, side: int) -> Image.Image:
    """The image with its longer side at `side` pixels, the shorter in proportion and at least one pixel."""
    scale = side / max(image.shape[:2])
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    return Image.fromarray(image).resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)


def paper(height: int, width: int) -> Picture:
    """An empty sheet."""
    return np.full((height, width, 3), _PAPER, dtype=np.uint8)


@cache
def letters(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font of all pictures; it comes with Pillow."""
    return ImageFont.load_default(size)


def save_png(picture: Picture, path: Path) -> None:
    """Write a picture, making its folder if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The strongest compression costs twenty times as long and saves a tenth.
    Image.fromarray(picture).save(path, format="PNG", compress_level=4)
