"""Pictures of predicted instance masks next to the ground truth.

Masks are (H, W) bool arrays of the size of the stored image. Each instance is a half-transparent area with an outline;
areas, outlines and tags are laid over the scaled image, so that small photographs have smooth outlines too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from visft_ds.tasks.pictures import (
    Colour,
    Picture,
    Rectangle,
    draw_tag,
    free_place,
    palette,
    scaled,
    side_by_side,
    tag_places,
    tag_size,
)
from visft_ds.tasks.segmentation.masks import MaskPlacement, rasterise

MaskArray = npt.NDArray[np.bool_]

_FILL = 0.5  # opacity of an area
_CROWD = 10  # more instances than this: no tags on the smallest
_FINE = 2  # masks are drawn this much larger and then averaged: smooth outlines
#: Instances of a category take turns: the category's colour itself, then so much towards white (+) or black (-).
_TONES = (0.0, 0.35, -0.3, 0.18, -0.15)


def decode_mask(segmentation: Any, height: int, width: int) -> MaskArray:
    """A COCO segmentation as (height, width) bool.

    `segmentation` is a list of polygons [[x, y, x, y, ...], ...] in pixels, or a run-length code {"size", "counts"}
    with plain counts (a list) or compressed ones (str or bytes).

    Raises ValueError for anything else, for a code of another size and for one that does not cover it exactly.
    """
    size = (height, width)
    return rasterise(segmentation, size, MaskPlacement(), size, size, subsamples=1) > 0


def draw_masks(
    image: Picture,
    true_masks: Sequence[MaskArray],
    true_names: Sequence[str],
    masks: Sequence[MaskArray],
    names: Sequence[str],
    scores: Sequence[float],
    *,
    threshold: float = 0.5,
    colours: Mapping[str, Colour] | None = None,
    side: int = 448,
) -> Picture:
    """Ground truth on the left, predictions with a score of at least `threshold` on the right.

    The image is scaled until its longer side has `side` pixels. `colours` gives a colour for each name (see
    `pictures.palette`); by default the names of this picture get their own. Several instances of one category differ a
    little in lightness. Smaller areas lie on top of larger ones, outlines and tags on top of all. Every category has a
    tag; beyond that, an instance whose tag finds no free place goes without, and in a crowd of more than ten also one
    that its tag would hide. A mask without any pixel counts in the title but is not seen.
    """
    base = scaled(image, side)
    known = palette(sorted({*true_names, *names})) if colours is None else colours
    truth = _shapes(true_masks, image.shape[:2], base.size)
    # largest object of the ground truth and surest prediction first: they get the best places for their tags
    order = sorted(range(len(truth)), key=lambda place: -_area(truth[place]))
    left = _with_masks(
        base, [truth[i] for i in order], [true_names[i] for i in order], [true_names[i] for i in order], known
    )
    right, count = predicted_masks(image, masks, names, scores, threshold=threshold, colours=known, side=side)
    return side_by_side(
        (left, f"ground truth: {len(truth)}"), (right, f"predicted, score from {threshold:.2f}: {count}")
    )


def predicted_masks(
    image: Picture,
    masks: Sequence[MaskArray],
    names: Sequence[str],
    scores: Sequence[float],
    *,
    threshold: float,
    colours: Mapping[str, Colour],
    side: int,
) -> tuple[Picture, int]:
    """The scaled image with the masks that have a score of at least `threshold`, and how many those are."""
    base = scaled(image, side)
    shown = [place for place in np.argsort(scores, kind="stable").tolist()[::-1] if scores[place] >= threshold]
    found = _shapes([masks[place] for place in shown], image.shape[:2], base.size)
    tags = [f"{names[place]} {scores[place]:.2f}" for place in shown]
    return _with_masks(base, found, [names[place] for place in shown], tags, colours), len(shown)


@dataclass(frozen=True)
class _Shape:
    """A mask on the finely scaled image, cut out of it: `inside` and `line` are (h, w) bool from (top, left) on."""

    top: int
    left: int
    inside: MaskArray
    line: MaskArray

    @property
    def window(self) -> tuple[slice, slice]:
        return (
            slice(self.top, self.top + self.inside.shape[0]),
            slice(self.left, self.left + self.inside.shape[1]),
        )


def _area(shape: _Shape | None) -> int:
    return 0 if shape is None else int(shape.inside.sum())


def _shapes(masks: Sequence[MaskArray], stored: tuple[int, ...], size: tuple[int, int]) -> list[_Shape | None]:
    """Masks of the stored image (height, width) on a canvas of `size` (width, height), None for empty ones."""
    for mask in masks:
        assert mask.dtype == np.bool_ and mask.shape == stored, (mask.dtype, mask.shape, stored)
    return [_shape(mask, (size[0] * _FINE, size[1] * _FINE)) for mask in masks]


def _shape(mask: MaskArray, fine: tuple[int, int]) -> _Shape | None:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return None
    thickness = _thickness(fine)
    spans = []
    for first, last, stored, wanted in (
        (int(rows[0]), int(rows[-1]) + 1, mask.shape[0], fine[1]),
        (int(columns[0]), int(columns[-1]) + 1, mask.shape[1], fine[0]),
    ):
        step = stored / wanted  # pixels of the image in one of the canvas
        # room for the line outside of the mask
        start = max(0, math.floor(first / step) - thickness)
        stop = min(wanted, math.ceil(last / step) + thickness)
        # what the interpolation looks at, two more pixels for its support
        low = max(0, math.floor(start * step - step) - 2)
        high = min(stored, math.ceil(stop * step + step) + 2)
        spans.append((start, stop, low, high, start * step - low, min(stop * step - low, high - low)))
    (top, bottom, y0, y1, box_top, box_bottom), (left, right, x0, x1, box_left, box_right) = spans
    part = Image.fromarray(mask[y0:y1, x0:x1].astype(np.uint8) * 255)
    cover = np.asarray(
        part.resize(
            (right - left, bottom - top), Image.Resampling.BILINEAR, box=(box_left, box_top, box_right, box_bottom)
        )
    )
    # A mask smaller than half a pixel is still one pixel large.
    inside = cover >= min(128, max(1, int(cover.max())))
    if not inside.any():
        inside[inside.shape[0] // 2, inside.shape[1] // 2] = True
    return _Shape(top, left, inside, _outline(inside, thickness))


def _thickness(fine: tuple[int, int]) -> int:
    """Of a line, pixels of the fine canvas; even, half of it outside of the mask."""
    return 2 * max(_FINE // 2, round(max(fine) / 180 / 2))


def _outline(inside: MaskArray, thickness: int) -> MaskArray:
    """A line along the border, half of it outside; also along the edge of the window, as around a box."""
    half = thickness // 2
    padded = np.pad(inside, half)
    return _near(padded, half) & _near(~padded, half)


def _near(area: MaskArray, reach: int) -> MaskArray:
    """Pixels with one of the area at most `reach` rows and columns away; without `reach` pixels at each border."""
    # Columns, then rows: Pillow's filters look at the whole square and take ten times as long.
    for _ in range(2):
        area = np.logical_or.reduce([area[start : len(area) - 2 * reach + start] for start in range(2 * reach + 1)]).T
    return area


def _with_masks(
    base: Image.Image,
    shapes: Sequence[_Shape | None],
    names: Sequence[str],
    tags: Sequence[str],
    colours: Mapping[str, Colour],
) -> Picture:
    """Draw instances, the most important first."""
    tones = list(_tones(names, colours))
    seen = [
        (shape, name, tag, tone) for shape, name, tag, tone in zip(shapes, names, tags, tones, strict=True) if shape
    ]
    layer = np.zeros((base.height * _FINE, base.width * _FINE, 4), dtype=np.uint8)
    upward = sorted(seen, key=lambda item: -_area(item[0]))
    for shape, _, _, tone in upward:
        layer[shape.window][shape.inside] = (*tone, round(255 * _FILL))
    for shape, _, _, tone in upward:
        layer[shape.window][shape.line] = (*tone, 255)
    overlay = Image.fromarray(layer).resize(base.size, Image.Resampling.BOX)
    canvas = Image.alpha_composite(base.convert("RGBA"), overlay).convert("RGB")
    draw = ImageDraw.Draw(canvas)
    taken: list[Rectangle] = []
    tagged = set()
    for shape, name, tag, tone in seen:
        places = _tag_places(tag, shape, base.size)
        place = free_place(places, taken)
        if name not in tagged:
            place = place or places[0]
        elif len(seen) > _CROWD and _area(shape) / _FINE**2 < math.prod(tag_size(tag)) / 2:
            place = None
        if place is not None:
            draw_tag(draw, tag, place, tone)
            taken.append(place)
            tagged.add(name)
    return np.asarray(canvas)


def _tones(names: Sequence[str], colours: Mapping[str, Colour]) -> Iterator[Colour]:
    """A colour for each instance: that of its category, in turn as it is, lighter, darker."""
    counts: dict[str, int] = {}
    for name in names:
        rank = counts.get(name, 0)
        counts[name] = rank + 1
        tone = _TONES[rank % len(_TONES)]
        goal = 255 if tone > 0 else 0
        red, green, blue = (round(value + (goal - value) * abs(tone)) for value in colours[name])
        yield red, green, blue


def _tag_places(tag: str, shape: _Shape, size: tuple[int, int]) -> list[Rectangle]:
    """On the mask where it is large enough, else around its bounding box."""
    width, height = tag_size(tag)
    rows, columns = np.flatnonzero(shape.inside.any(axis=1)), np.flatnonzero(shape.inside.any(axis=0))
    x0, x1 = ((shape.left + int(column)) / _FINE for column in (columns[0], columns[-1]))
    y0, y1 = ((shape.top + int(row)) / _FINE for row in (rows[0], rows[-1]))
    around = tag_places(tag, (x0, y0, x1, y1), size)
    if x1 - x0 < 1.5 * width or y1 - y0 < 3 * height:
        return around
    # the middle of the longest run in the row that halves the area; a centre of mass may lie beside the object
    halving = int(np.searchsorted(shape.inside.sum(axis=1).cumsum(), shape.inside.sum() / 2))
    ends = np.flatnonzero(np.diff(np.pad(shape.inside[halving], 1).astype(np.int8)))
    starts, stops = ends[::2], ends[1::2]
    longest = int((stops - starts).argmax())
    x = (shape.left + (int(starts[longest]) + int(stops[longest])) / 2) / _FINE - width / 2
    y = (shape.top + halving) / _FINE - height / 2
    x, y = min(max(x, 0), max(size[0] - width, 0)), min(max(y, 0), max(size[1] - height, 0))
    return [(x, y, x + width, y + height), *around]
