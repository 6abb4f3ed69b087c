"""Random images of textured shapes, with the exact visible pixels of every shape.

A scene is a textured background, at times a crowd of tiny shapes, and a few larger shapes painted back to
front.

Shape letters: H W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from faster_coco_eval import mask as coco_mask  # pycocotools' decode() warns under NumPy 2

from visft_ds.toy.patterns import Array, blobs, directions, ground, texture
from visft_ds.toy.shapes import NAMES, OUTLINES, Polygon
from visft_ds.toy.styles import Style

MAX_SHAPES = 3
EMPTY_SHARE = 0.05
CROWD_SHARE = 0.06
#: Half the side of a shape, smallest and largest, relative to the shorter side of the image.
EXTENT = (0.16, 0.3)
TILT = 20.0  #: degrees either way
_TRIES = 12  #: random places for a shape; if none is free, the scene has one shape less


@dataclass(frozen=True)
class Shape:
    """Shape of a scene. `polygons` are in pixels; `visible` (H, W) bool is what later shapes left of it."""

    category: str
    colour: str
    texture: str
    polygons: Sequence[Polygon]
    pixels: int  #: inside the image, before anything was painted over it
    visible: Array = field(repr=False)

    @property
    def middle(self) -> tuple[float, float]:
        """Mean of the visible pixels, (x, y) relative to the image."""
        height, width = self.visible.shape
        y, x = np.nonzero(self.visible)
        return float(x.mean() + 0.5) / width, float(y.mean() + 0.5) / height

    def is_whole(self) -> bool:
        """Return True if neither another shape nor the border of the image hides a part of it."""
        height, width = self.visible.shape
        corners = np.concatenate(self.polygons)
        inside = (corners >= 0).all() and (corners <= (width, height)).all()
        return bool(inside and self.visible.sum() == self.pixels)


@dataclass(frozen=True)
class Scene:
    """Drawn image. `image` (H, W, 3) uint8 RGB; `crowd` is a group of tiny shapes of one category."""

    image: Array
    background: str
    shapes: list[Shape]
    crowd: Shape | None


def draw_scene(
    rng: np.random.Generator, style: Style, height: int, width: int, *, max_shapes: int = MAX_SHAPES
) -> Scene:
    """Draw a random image with everything that is known about it.

    About 5 % of the images have no shapes, 6 % a crowd. Later shapes cover earlier ones, but each keeps at
    least 70 % of its pixels whenever one is added, and shapes that reach over the border lose at most 15 %.

    Args:
        max_shapes: from one to so many, one as likely as the other. Where there may be more than MAX_SHAPES,
            they are smaller, so that together they fill as much.
    """
    colours = list(style.ground_colours)
    ground_colour = str(rng.choice(colours))
    ground_kind = str(rng.choice(style.grounds))
    canvas = _background(rng, style, ground_kind, ground_colour, height, width)
    count = 0
    if rng.random() >= EMPTY_SHARE:
        count = math.ceil(max_shapes * rng.random())
    crowd = None
    if rng.random() < CROWD_SHARE:
        crowd = _add_crowd(rng, style, canvas)
    shapes = list[Shape]()
    scale = math.sqrt(min(1.0, MAX_SHAPES / max(1, max_shapes)))
    for _ in range(count):
        shape = _add_shape(rng, style, canvas, scale, shapes, crowd)
        if shape is not None:
            shapes.append(shape)
    if crowd is not None and not crowd.visible.any():  # wholly painted over: nobody could see or name it
        crowd = None
    if style.grain:
        canvas += rng.normal(0, style.grain, canvas.shape)
    image = np.clip(np.rint(canvas), 0, 255).astype(np.uint8)
    return Scene(image, f"{ground_kind} {ground_colour} background", shapes, crowd)


def _background(
    rng: np.random.Generator, style: Style, kind: str, colour: str, height: int, width: int
) -> Array:
    """(height, width, 3) float32 RGB: a textured ground with weak contrast."""
    u, v = directions(rng, height, width)
    period = rng.uniform(0.05, 0.12) * style.period * min(height, width)
    light = 14 * blobs(rng, u.shape, 2)
    light += style.contrast * ground(kind, rng, u, v, period)
    tint = rng.normal(0, 6, 3)
    base = np.asarray(style.ground_colours[colour], np.float32)
    return base + light[..., None] + tint


def _add_crowd(rng: np.random.Generator, style: Style, canvas: Array) -> Shape:
    """Paint eight to fifteen tiny copies of one outline close together; they count as one shape."""
    height, width, _ = canvas.shape
    side = min(height, width)
    category = _random_category(rng, style)
    middle = rng.uniform(0.25, 0.75, 2) * (width, height)
    polygons = list[Polygon]()
    for _ in range(rng.integers(8, 16)):
        centre = middle + rng.normal(0, 0.11 * side, 2)
        extent = side * rng.uniform(0.028, 0.04)
        polygons += _place_outline(rng, category, extent, centre, tilt=25)
    return _paint_shape(rng, style, canvas, category, polygons)


def _add_shape(
    rng: np.random.Generator,
    style: Style,
    canvas: Array,
    scale: float,
    shapes: Sequence[Shape],
    crowd: Shape | None,
) -> Shape | None:
    """Paint a shape of random category, size (times `scale`) and place over what is there, if a place is
    free: one in which the image shows most of it, and no other shape loses more than it may.
    """
    height, width, _ = canvas.shape
    for _ in range(_TRIES):
        category = _random_category(rng, style)
        extent = min(height, width) * scale * rng.uniform(*EXTENT)
        x = rng.uniform(0.6 * extent, width - 0.6 * extent)
        y = rng.uniform(0.6 * extent, height - 0.6 * extent)
        polygons = _place_outline(rng, category, extent, np.array([x, y]), TILT)
        covered = rasterise(polygons, height, width)
        if covered.sum() < 0.85 * sum(map(_area, polygons)):
            continue
        if any((shape.visible & ~covered).sum() < 0.7 * shape.pixels for shape in shapes):
            continue
        for shape in shapes:
            shape.visible[covered] = False
        if crowd is not None:
            crowd.visible[covered] = False
        return _paint_shape(rng, style, canvas, category, polygons)
    return None


def _random_category(rng: np.random.Generator, style: Style) -> str:
    position = int(rng.integers(len(style.categories)))
    return style.categories[position]


def _place_outline(
    rng: np.random.Generator, category: str, extent: float, centre: Array, tilt: float
) -> list[Polygon]:
    """The outline of a category in pixels, mirrored and tilted (degrees) at random; `extent` is half its
    side.
    """
    angle = math.radians(rng.uniform(-tilt, tilt))
    mirror = -1.0 if rng.random() < 0.5 else 1.0
    stretch = extent * np.array([mirror * rng.uniform(0.85, 1.15), 1.0])
    cosine = math.cos(angle)
    sine = math.sin(angle)
    rotation = np.array([[cosine, sine], [-sine, cosine]])
    polygons = []
    for outline in OUTLINES[category]:
        polygon = (outline * stretch) @ rotation + centre
        polygons.append(np.round(polygon, 2))
    return polygons


def _area(polygon: Polygon) -> float:
    """Area of a polygon by the shoelace formula."""
    x, y = polygon.T
    next_x = np.roll(x, -1)
    next_y = np.roll(y, -1)
    return abs(float(np.dot(x, next_y) - np.dot(y, next_x))) / 2


def rasterise(polygons: Sequence[Polygon], height: int, width: int) -> Array:
    """(height, width) bool: the pixels COCO counts as inside, by COCO's own rasteriser."""
    corners = [polygon.ravel().tolist() for polygon in polygons]
    code = coco_mask.merge(coco_mask.frPyObjects(corners, height, width))
    return np.asarray(coco_mask.decode(code)).astype(bool)


def _paint_shape(
    rng: np.random.Generator, style: Style, canvas: Array, category: str, polygons: Sequence[Polygon]
) -> Shape:
    """Paint a shape of its own or a random colour and of a random texture, and describe it.

    A colour of its own makes the task learnable in minutes, as yellow helps with bananas; it differs between
    the styles.
    """
    height, width, _ = canvas.shape
    colours = list(style.colours)
    if rng.random() < style.own_colour:
        colour = colours[NAMES.index(category) % len(colours)]
    else:
        colour = str(rng.choice(colours))
    surface = str(rng.choice(style.textures))
    _paint(rng, style, canvas, polygons, colour, surface)
    visible = rasterise(polygons, height, width)
    return Shape(category, colour, surface, polygons, int(visible.sum()), visible)


def _paint(
    rng: np.random.Generator,
    style: Style,
    canvas: Array,
    polygons: Sequence[Polygon],
    colour: str,
    surface: str,
) -> None:
    """Paint polygons into `canvas` (H, W, 3) float32 in place, with soft edges."""
    # the part of the canvas around them
    corners = np.concatenate(polygons)
    low = np.floor(corners.min(axis=0)).astype(int) - 1
    high = np.ceil(corners.max(axis=0)).astype(int) + 1
    left, top = np.maximum(low, 0).tolist()
    crop = canvas[top : high[1], left : high[0]]
    height, width, _ = crop.shape
    # the share of each pixel that they cover, of three by three subsamples
    enlarged = [(polygon - (left, top)) * 3 for polygon in polygons]
    samples = rasterise(enlarged, height * 3, width * 3).reshape(height, 3, width, 3)
    cover = samples.mean(axis=(1, 3), dtype=np.float32)[..., None]
    crop += cover * (_surface(rng, style, surface, colour, height, width) - crop)


def _surface(
    rng: np.random.Generator, style: Style, surface: str, colour: str, height: int, width: int
) -> Array:
    """(height, width, 3) float32 RGB: a surface of one colour; the pattern darkens it, or lightens a dark
    one.
    """
    u, v = directions(rng, height, width)
    period = max(4.0, 0.3 * style.period * max(height, width))
    pattern = texture(surface, rng, u, v, period)
    if pattern.dtype == bool:
        pattern = pattern.astype(np.float32)
    base = np.asarray(style.colours[colour], np.float32)
    brightness = float(base @ np.array([0.3, 0.59, 0.11]))
    other = base * 0.55 if brightness > 115 else base * 0.45 + 255 * 0.55
    strength = 0.8 * style.contrast * pattern[..., None]
    return base + (other - base) * strength
