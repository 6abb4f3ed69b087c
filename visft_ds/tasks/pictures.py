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

from visft_ds.files import release

Picture = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]
Colour = tuple[int, int, int]
Box = Sequence[float]  #: x, y, width, height
Corners = tuple[float, float, float, float]  #: left, top, right, bottom
_PAPER: Colour = (250, 250, 248)
_INK: Colour = (45, 45, 48)
SIDE = 448  #: of the longer side of an image in a picture, pixels
TEXT = 14  #: size of letters, pixels
_TITLE = 17  # size of the letters of a title, pixels
_HEADER = _TITLE + 9  # height of a title with the space around it, pixels
_GAP = 12  # between panels, pixels
_OPACITY = 0.5  # of a mask
_SMALL_BOX = 100 * TEXT  # pixels of a box that no tag may hide: it would cover much of what is in it
_ROWS = 256  # of its pixels that are looked at together
_FINEST = 8  # pixels of an image, along a side, for one of its picture


def palette(names: Sequence[str]) -> dict[str, Colour]:
    """A colour for each category name: twelve hues, five steps apart from name to name; the next dozen
    darker.

    Give all names of a data set, so that a category has one colour in all pictures.
    """
    colours = {}
    for number, name in enumerate(dict.fromkeys(names)):
        dozen, step = divmod(number, 12)
        hue = step * 5 / 12 % 1
        brightness = (1.0, 0.75, 0.5)[dozen % 3]
        red, green, blue = colorsys.hsv_to_rgb(hue, 0.85, brightness)
        colours[name] = (round(red * 255), round(green * 255), round(blue * 255))
    return colours


def draw_objects(
    image: Picture,
    names: Sequence[str],
    tags: Sequence[str],
    colours: Mapping[str, Colour],
    *,
    boxes: Sequence[Box] = (),
    masks: Sequence[Mask] | None = None,
    side: int = SIDE,
) -> Picture:
    """The scaled image with boxes (n, 4), masks (n, H, W) or both, and a tag for each; the first ones lie on
    top.

    A tag stands above its box, or where it hides no small box and no other tag; without such a place it is
    left out. Of masks without boxes these are the boxes around them, which are not drawn. A box without a tag
    is not drawn either.
    """
    picture = scaled(image, side)
    has_outlines = len(boxes) > 0
    if masks is not None:
        picture = _under_masks(picture, masks, [colours[name] for name in names])
        if not has_outlines:
            boxes = [_box_around(mask) for mask in masks]
    scale = side / max(image.shape[:2])
    line = max(2, side // 180)
    draw = ImageDraw.Draw(picture)
    corners = [_corners(box, scale, picture.size) for box in boxes]
    tagged = [number for number, tag in enumerate(tags) if tag]
    small = []
    for number in tagged:
        left, top, right, bottom = corners[number]
        if (right - left) * (bottom - top) < _SMALL_BOX:
            small.append(corners[number])
    written = list[Corners]()
    for number in tagged:
        corner = _place_of_tag(draw, tags[number], corners[number], picture.size, [*small, *written])
        if corner is not None:
            written.append(_draw_tag(draw, tags[number], colours[names[number]], corner))
    if has_outlines:
        for number in reversed(tagged):
            draw.rectangle(corners[number], outline=colours[names[number]], width=line)
    return np.asarray(picture)


def _place_of_tag(
    draw: ImageDraw.ImageDraw, tag: str, corners: Corners, size: tuple[int, int], others: Sequence[Corners]
) -> tuple[float, float] | None:
    """Left and top of a tag of this box where it covers none of the others; None: there is no such place."""
    left, top, _, bottom = corners
    _, _, width, height = draw.textbbox((0, 0), tag, font=letters(TEXT))
    x = max(0.0, min(left + 2, size[0] - width - 2))
    for y in (top - height - 3, bottom + 3, top + 3):
        extent = (x - 2, y - 1, x + width + 2, y + height + 1)
        if y >= 0 and extent[3] <= size[1] and not any(_overlap(extent, other) for other in others):
            return x, y
    return None


def _overlap(first: Corners, second: Corners) -> bool:
    """Return True for two rectangles with an area in common."""
    is_beside = first[2] <= second[0] or second[2] <= first[0]
    is_above = first[3] <= second[1] or second[3] <= first[1]
    return not is_beside and not is_above


def _under_masks(picture: Image.Image, masks: Sequence[Mask], colours: Sequence[Colour]) -> Image.Image:
    """The picture under half-transparent masks (n, H, W), the first one on top."""
    pixels = np.array(picture, dtype=np.float32)
    coloured = list(zip(masks, colours, strict=True))
    for mask, colour in reversed(coloured):
        scaled_mask = Image.fromarray(mask).resize(picture.size)
        inside = np.asarray(scaled_mask, dtype=bool)
        below = pixels[inside] * (1 - _OPACITY)
        pixels[inside] = below + np.array(colour) * _OPACITY
    pixels = pixels.round()
    return Image.fromarray(pixels.astype(np.uint8))


def _box_around(mask: Mask) -> Box:
    around = Image.fromarray(mask).getbbox()
    if around is None:
        return (0, 0, 0, 0)
    left, top, right, bottom = around
    return left, top, right - left, bottom - top


def _corners(box: Box, scale: float, size: tuple[int, int]) -> Corners:
    """Left, top, right and bottom of a box in a scaled picture of this width and height."""
    x, y, width, height = box
    corners = np.array([x, y, x + max(width, 0), y + max(height, 0)]) * scale
    left, top, right, bottom = corners.clip(0, np.array(size * 2) - 1).tolist()
    return left, top, right, bottom


def _draw_tag(draw: ImageDraw.ImageDraw, tag: str, colour: Colour, corner: tuple[float, float]) -> Corners:
    """Write a tag on a ground of its colour, from this left and top; returns the ground."""
    font = letters(TEXT)
    left, top, right, bottom = draw.textbbox(corner, tag, font=font)
    ground = (left - 2, top - 1, right + 2, bottom + 1)
    draw.rectangle(ground, fill=colour)
    # ITU-R BT.601 luma decides whether dark or light letters can be read on the colour.
    luma = float(np.dot(colour, (0.299, 0.587, 0.114)))
    ink = (0, 0, 0) if luma > 140 else (255, 255, 255)
    draw.text(corner, tag, fill=ink, font=font)
    return ground


def with_text(image: Picture, lines: Sequence[str], side: int = SIDE) -> Picture:
    """The scaled image above some lines of text, each wrapped to the width and cut off after four."""
    picture = scaled(image, side)
    font = letters(TEXT)
    columns = max(8, int(side / font.getlength("n")))
    wrapped = [textwrap.fill(line, columns, max_lines=4, placeholder=" …") for line in lines]
    text = "\n".join(wrapped)
    rows = text.count("\n") + 2
    width = max(side, picture.width)
    height = picture.height + rows * (TEXT + 5)
    sheet = _paper(width, height)
    sheet.paste(picture)
    draw = ImageDraw.Draw(sheet)
    draw.multiline_text((3, picture.height + 4), text, fill=_INK, font=font)
    return np.asarray(sheet)


def side_by_side(*panels: tuple[Picture, str]) -> Picture:
    """Pictures beside each other, each below its title, filled up with paper to one size in which the titles
    fit.
    """
    font = letters(_TITLE)
    height = width = 0
    for picture, title in panels:
        height = max(height, picture.shape[0])
        width = max(width, picture.shape[1], int(font.getlength(title)) + 5)
    sheet = _paper(len(panels) * (width + _GAP) - _GAP, height + _HEADER)
    draw = ImageDraw.Draw(sheet)
    left = 0
    for picture, title in panels:
        draw.text((left + 2, 3), title, fill=_INK, font=font)
        sheet.paste(Image.fromarray(picture), (left, _HEADER))
        left += width + _GAP
    return np.asarray(sheet)


def split_panels(picture: Picture) -> tuple[Picture, Picture]:
    """The two panels of a picture by `side_by_side`, each with its title."""
    width = (picture.shape[1] - _GAP) // 2
    left = picture[:, :width]
    right = picture[:, width + _GAP :]
    return left, right


def grid(pictures: Sequence[Picture]) -> Picture:
    """Pictures in rows of two; a row is as high as its highest picture, both columns are equally wide."""
    width = max(picture.shape[1] for picture in pictures) + _GAP
    tops = []
    bottom = _GAP
    for start in range(0, len(pictures), 2):
        row = pictures[start : start + 2]
        tops.append(bottom)
        bottom += max(picture.shape[0] for picture in row) + _GAP
    sheet = _paper(min(2, len(pictures)) * width + _GAP, bottom)
    for number, picture in enumerate(pictures):
        row_number, column = divmod(number, 2)
        left = _GAP + column * width
        sheet.paste(Image.fromarray(picture), (left, tops[row_number]))
    return np.asarray(sheet)


def scaled(image: Picture, side: int) -> Image.Image:
    """The image with its longer side at `side` pixels, the shorter in proportion and at least one pixel.

    Of a very large one only some pixels are looked at: a copy may not fit into the memory.
    """
    height, width, _ = image.shape
    step = max(1, max(height, width) // (_FINEST * side))
    if step > 1:
        parts = []
        for top in range(0, height, _ROWS * step):
            parts.append(image[top : top + _ROWS * step : step, ::step].copy())
            release(image)
        image = np.concatenate(parts)
    scale = side / max(height, width)
    width = max(1, round(width * scale))
    height = max(1, round(height * scale))
    size = (width, height)
    return Image.fromarray(image).resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)


def _paper(width: int, height: int) -> Image.Image:
    """An empty sheet."""
    return Image.new("RGB", (width, height), _PAPER)


@cache
def letters(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font of all pictures; it comes with Pillow."""
    return ImageFont.load_default(size)


def save_picture(picture: Picture, path: Path) -> None:
    """Write a picture as JPEG, making its folder if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path, format="JPEG", quality=90)
