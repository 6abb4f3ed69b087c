"""Random images of textured shapes, with the exact visible pixels of every shape.

A scene is a textured background, at times a crowd of tiny shapes, and a few larger shapes painted back to
front.

Shape letters: H W pixels, P polygon corners.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from faster_coco_eval import mask as coco_mask  # pycocotools' decode() warns under NumPy 2
from PIL import Image

Array = npt.NDArray[Any]
Polygon = npt.NDArray[np.float64]  # (P, 2) x, y

MAX_SHAPES = 3
EMPTY_SHARE = 0.05
CROWD_SHARE = 0.06
EXTENT = (0.16, 0.3)  #: half the side of a shape, relative to the shorter side of the image
#: How often a category comes in its own colour, else in any. "even": colour says nothing about shape.
COLOURS = {"usual": 0.85, "even": 0.0}
_NUMBER = re.compile(r"[0-9]{1,9}")  #: of a drawn style
TILT = 20.0  #: degrees either way
#: Raw category ids have holes and do not start the alphabet at 1, as COCO's do not.
CATEGORIES = (
    *((1, "circle", "round"), (3, "ring", "round"), (4, "crescent", "round"), (8, "heart", "round")),
    *(
        (13, "square", "angular"),
        (17, "triangle", "angular"),
        (27, "bar", "angular"),
        (34, "hourglass", "angular"),
    ),
    *((52, "star", "pointed"), (61, "cross", "pointed"), (78, "arrow", "pointed"), (90, "bolt", "pointed")),
)
NAMES = tuple(name for _, name, _ in CATEGORIES)


@dataclass(frozen=True)
class Style:
    """Colours (RGB 0..255), surface textures and background kinds of one family of images."""

    colours: dict[str, tuple[int, int, int]]
    textures: tuple[str, ...]
    backgrounds: tuple[str, ...]
    background_colours: dict[str, tuple[int, int, int]]
    usual_share: float = COLOURS["usual"]
    period: float = 1.0  #: of the patterns, relative to their usual one
    contrast: float = 1.0  #: of the patterns, relative to their usual one
    grain: float = 0.0  #: standard deviation of the noise on every value of the finished image
    shapes: tuple[int, ...] = tuple(
        range(len(CATEGORIES))
    )  #: positions in CATEGORIES of those that scenes show


def _colours(text: str) -> dict[str, tuple[int, int, int]]:
    """Name -> RGB of `NAME=RRGGBB ...`; `_` stands for a space."""
    pairs = (pair.split("=") for pair in text.split())
    return {name.replace("_", " "): tuple(bytes.fromhex(value)) for name, value in pairs}  # type: ignore[misc]


STYLES = {
    "a": Style(
        _colours(
            "red=d42622 green=269434 blue=2448ce yellow=f2ce26 purple=862ca8 orange=f47e16 black=18181a "
            "white=f8f8f8 brown=78461e pink=fa82be cyan=1ec8dc lime=96e132"
        ),
        ("plain", "striped", "dotted", "shaded"),
        ("cloudy", "grainy", "lined"),
        _colours("gray=969698 beige=cdbea0 pale_blue=a8c0d0"),
    ),
    "b": Style(
        _colours(
            "rose=ff6e96 teal=1ea096 olive=969628 ivory=faf6dc gold=e0b24c lavender=baa6fa mint=96f0be "
            "coral=ff785a silver=bec3c8 azure=5aaaff magenta=e128c8 crimson=be143c"
        ),
        ("plain", "checked", "wavy", "speckled"),
        ("tiled", "marbled", "spotted"),
        _colours("brown=5c3e2c dark_green=204636 navy=1c2454"),
    ),
}


#: Surfaces and grounds of drawn styles: those that style a, which demo and experiments train on, lacks.
_DRAWN_TEXTURES = ("checked", "wavy", "speckled", "ringed", "hatched", "zigzag", "mottled")
_DRAWN_GROUNDS = ("tiled", "marbled", "spotted", "quilted", "misty", "scratched")
#: Least distance in RGB of a drawn colour to the grounds; half of it to other colours of its kind.
_APART = 90.0


def drawn_style(number: int) -> Style:
    """A style drawn by a number from 0, for experiments in which styles are the sample."""
    rng = np.random.default_rng([number, 1])

    def colours(
        count: int, name: str, grounds: Sequence[tuple[int, int, int]]
    ) -> dict[str, tuple[int, int, int]]:
        found: dict[str, tuple[int, int, int]] = {}
        while len(found) < count:
            colour = rng.integers(0, 256, 3)
            far = all(np.linalg.norm(colour - other) >= _APART for other in grounds)
            new = all(np.linalg.norm(colour - other) >= _APART / 2 for other in found.values())
            if far and new:
                found[f"{name}{len(found) + 1}"] = tuple(colour.tolist())
        return found

    grounds = colours(3, "shade", ())
    return Style(
        colours(len(CATEGORIES), "tint", list(grounds.values())),
        tuple(rng.choice(_DRAWN_TEXTURES, 4, replace=False).tolist()),
        tuple(rng.choice(_DRAWN_GROUNDS, 3, replace=False).tolist()),
        grounds,
        period=float(rng.uniform(0.6, 1.6)),
        contrast=float(rng.uniform(0.6, 1.2)),
        grain=float(rng.uniform(0, 16)),
    )


def style_of(name: str, colours: str, without: Sequence[str] = ()) -> Style:
    """A style of STYLES, or the one that a number draws, with one of COLOURS, without some shapes.

    Raises ValueError for unknown ones, or no shape left.
    """
    shapes = tuple(place for place, shape in enumerate(NAMES) if shape not in without)
    known = name in STYLES or bool(_NUMBER.fullmatch(name))
    if not known or colours not in COLOURS or not shapes or len(shapes) + len(set(without)) > len(NAMES):
        allowed = f"{', '.join(STYLES)}, a number; {', '.join(COLOURS)}; {', '.join(NAMES)}"
        raise ValueError(
            f"style {name!r}, colours {colours!r}, without {', '.join(without)!r}: allowed are {allowed}"
        )
    style = STYLES[name] if name in STYLES else drawn_style(int(name))
    return replace(style, usual_share=COLOURS[colours], shapes=shapes)


@dataclass(frozen=True)
class Shape:
    """Shape of a scene. `polygons` are in pixels; `visible` (H, W) bool is what later shapes left of it."""

    category: int  #: position in CATEGORIES
    colour: str
    texture: str
    polygons: list[Polygon]
    whole: int  #: its pixels inside the image before anything was painted over it
    visible: Array = field(repr=False)

    def segmentation(self) -> list[Polygon]:
        """Polygons of the visible pixels: the outline itself where nothing hides it, else traced along the
        pixels.
        """
        height, width = self.visible.shape
        corners = np.concatenate(self.polygons)
        inside = bool((corners >= 0).all() and (corners <= (width, height)).all())
        return self.polygons if inside and int(self.visible.sum()) == self.whole else trace(self.visible)


@dataclass(frozen=True)
class Scene:
    """Drawn image. `image` (H, W, 3) uint8 RGB; `crowd` is a group of tiny shapes of one category, or
    None.
    """

    image: Array
    background: str
    shapes: list[Shape]
    crowd: Shape | None


def _arc(
    start: float, stop: float, radius: float = 1.0, corners: int = 24, centre: tuple[float, float] = (0, 0)
) -> Polygon:
    angles = np.linspace(math.radians(start), math.radians(stop), corners)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1) * radius + np.asarray(centre, dtype=np.float64)


def _outline(name: str) -> list[Polygon]:
    """A category's outline in the square [-1, 1]^2, y down; a ring has two parts: COCO polygons have no
    holes.
    """
    a, b = 0.33, 0.98
    half = [[-a, -b], [a, -b], [a, -a], [b, -a], [b, a], [a, a]]
    corners: dict[str, list[list[float]]] = {
        "cross": [*half, *([-x, -y] for x, y in half)],
        "square": [[-0.85, -0.85], [0.85, -0.85], [0.85, 0.85], [-0.85, 0.85]],
        "triangle": [[0, -0.95], [1, 0.8], [-1, 0.8]],
        "bar": [[-1, -0.32], [1, -0.32], [1, 0.32], [-1, 0.32]],
        "hourglass": [[-0.8, -1], [0.8, -1], [0.14, 0], [0.8, 1], [-0.8, 1], [-0.14, 0]],
        "arrow": [[-1, -0.28], [0.1, -0.28], [0.1, -0.85], [1, 0], [0.1, 0.85], [0.1, 0.28], [-1, 0.28]],
        "bolt": [
            [-0.15, -1],
            [0.65, -1],
            [0.25, -0.25],
            [0.75, -0.25],
            [-0.45, 1],
            [-0.1, 0.12],
            [-0.65, 0.12],
        ],
    }
    if name in corners:
        return [np.asarray(corners[name], dtype=np.float64)]
    if name == "circle":
        return [_arc(0, 345, 0.95)]
    if name == "ring":
        # The halves overlap by a few degrees so that rounding leaves no seam between them.
        halves = ((86, 274), (266, 454))
        return [np.concatenate([_arc(a, b, 1.0, 20), _arc(b, a, 0.52, 20)]) for a, b in halves]
    if name == "crescent":
        # Blunt horns: sharp ones would be thinner than a pixel and vanish from the mask.
        moon = np.concatenate([_arc(72.5, 287.5, 1.0), _arc(264, 96, 0.78, centre=(0.38, 0))])
        return [moon + np.asarray((0.35, 0.0))]
    if name == "heart":
        t = np.linspace(0, 2 * math.pi, 32, endpoint=False)
        y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        return [np.stack([16 * np.sin(t) ** 3, -y - 2.5], axis=1) / 16]
    assert name == "star", name
    turns = np.arange(10) * math.pi / 5 - math.pi / 2
    radius = np.where(np.arange(10) % 2 == 0, 1.05, 0.45)
    return [np.stack([np.cos(turns), np.sin(turns)], axis=1) * radius[:, None]]


OUTLINES = {name: _outline(name) for name in NAMES}


def rasterise(polygons: list[Polygon], height: int, width: int) -> Array:
    """(height, width) bool: the pixels COCO counts as inside, by COCO's own rasteriser."""
    parts = coco_mask.frPyObjects([polygon.ravel().tolist() for polygon in polygons], height, width)
    return np.asarray(coco_mask.decode(coco_mask.merge(parts))).astype(bool)


def _boundary_loops(mask: Array) -> Iterator[list[tuple[int, int]]]:
    """Closed loops along the pixel edges of `mask`, interior on the right; diagonal neighbours are not
    joined.
    """
    height, width = mask.shape
    padded = np.pad(mask, 1)
    following: dict[tuple[int, int], list[tuple[int, int]]] = {}
    # Side of a pixel -> its corners in walking order, as offsets (x, y) from the pixel.
    sides = {(-1, 0): (0, 0, 1, 0), (0, 1): (1, 0, 1, 1), (1, 0): (1, 1, 0, 1), (0, -1): (0, 1, 0, 0)}
    for (dy, dx), (x0, y0, x1, y1) in sides.items():
        outside = ~padded[1 + dy : 1 + dy + height, 1 + dx : 1 + dx + width]
        for y, x in np.argwhere(mask & outside).tolist():
            following.setdefault((x + x0, y + y0), []).append((x + x1, y + y1))
    while following:
        start = here = next(iter(following))
        before: tuple[int, int] | None = None
        loop: list[tuple[int, int]] = []
        while here in following:
            options = following[here]
            straight = None if before is None else (2 * here[0] - before[0], 2 * here[1] - before[1])
            right = None if before is None else (here[0] - here[1] + before[1], here[1] + here[0] - before[0])
            if here == start and before is not None and right not in options:
                break
            after = right if len(options) > 1 and right in options else options[0]
            options.remove(after)
            if not options:
                del following[here]
            if after != straight:
                loop.append(here)
            before, here = here, after
        yield loop


def trace(mask: Array) -> list[Polygon]:
    """Polygons whose COCO raster is exactly `mask` (H, W) bool.

    Corners are pixel corners. A part with a hole is cut in two through the hole, because COCO polygons have
    none.
    """
    polygons = []
    for loop in _boundary_loops(mask):
        x, y = np.asarray(loop, dtype=np.float64).T
        if np.dot(x, np.roll(y, -1)) < np.dot(y, np.roll(x, -1)):  # negative area: the loop runs round a hole
            cut = int(x.min() + x.max()) // 2
            columns = np.arange(mask.shape[1])
            return trace(mask & (columns < cut)) + trace(mask & (columns >= cut))
        polygons.append(np.stack([x, y], axis=1))
    return polygons


def _blobs(rng: np.random.Generator, shape: tuple[int, ...], cells: int) -> Array:
    """(height, width) smooth noise in about [-1, 1] with roughly `cells` bumps a side."""
    height, width = shape
    coarse = Image.fromarray(rng.uniform(-1, 1, (cells + 1, cells + 1)).astype(np.float32))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


#: Texture -> pattern (height, width) of a surface, 0 to 1: (generator, u, v, period) with coordinates in
#: periods.
_Pattern = Callable[[np.random.Generator, Array, Array, float], Array]
_TEXTURES: dict[str, _Pattern] = {
    "plain": lambda rng, u, v, period: np.zeros_like(u),
    "striped": lambda rng, u, v, period: u / period % 1 < 0.4,
    "dotted": lambda rng, u, v, period: ((u / period % 1 - 0.5) ** 2 + (v / period % 1 - 0.5) ** 2) < 0.07,
    "shaded": lambda rng, u, v, period: np.clip(0.5 + u / (2.2 * max(u.shape)), 0, 1) * 0.9,
    "checked": lambda rng, u, v, period: (u / period % 1 < 0.5) != (v / period % 1 < 0.5),
    "wavy": lambda rng, u, v, period: (
        0.5 + 0.5 * np.sin(2 * math.pi * (u + 0.25 * period * np.sin(4 * v / period)) / period)
    ),
    "speckled": lambda rng, u, v, period: rng.random(u.shape, dtype=np.float32) < 0.18,
    "ringed": lambda rng, u, v, period: _rings(u.shape, 0.7 * period),
    "hatched": lambda rng, u, v, period: (u / (0.6 * period) % 1 < 0.25) | (v / (0.6 * period) % 1 < 0.25),
    "zigzag": lambda rng, u, v, period: (u / period + np.abs(2 * (v / period % 1) - 1)) % 1 < 0.4,
    "mottled": lambda rng, u, v, period: _blobs(rng, u.shape, 5) > 0,
}
#: Kind of background -> change of its light.
_GROUNDS: dict[str, _Pattern] = {
    "cloudy": lambda rng, u, v, period: 22 * _blobs(rng, u.shape, 6),
    "grainy": lambda rng, u, v, period: rng.integers(-24, 25, u.shape, dtype=np.int16),
    "lined": lambda rng, u, v, period: 14 * np.sin(2 * math.pi * u / period),
    "tiled": lambda rng, u, v, period: -26 * _bricks(u.shape, period),
    "marbled": lambda rng, u, v, period: (
        20 * np.sin(2 * math.pi * u / (3 * period) + 5 * _blobs(rng, u.shape, 5))
    ),
    "spotted": lambda rng, u, v, period: (
        22 * (((u / period % 1 - 0.5) ** 2 + (v / period % 1 - 0.5) ** 2) < 0.06)
    ),
    "quilted": lambda rng, u, v, period: (
        -26 * ((u / (2 * period) % 1 < 0.08) | (v / (2 * period) % 1 < 0.08))
    ),
    "misty": lambda rng, u, v, period: 45 * (u - u.min()) / (u.max() - u.min()) - 30,
    "scratched": lambda rng, u, v, period: (
        -24 * (np.sin(2 * math.pi * u / period + 9 * _blobs(rng, u.shape, 3)) > 0.93)
    ),
}


def _rings(shape: tuple[int, ...], period: float) -> Array:
    height, width = shape
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    rings: Array = np.hypot(x - width / 2, y - height / 2) / period % 1 < 0.4
    return rings


def _bricks(shape: tuple[int, ...], period: float) -> Array:
    y, x = np.mgrid[0 : shape[0], 0 : shape[1]].astype(np.float32)
    shifted = x + np.where(y // (2 * period) % 2 < 1, 0, 2 * period)
    joints: Array = (y % (2 * period) < 2) | (shifted % (4 * period) < 2)
    return joints


def _turned(rng: np.random.Generator, height: int, width: int) -> tuple[Array, Array]:
    """Coordinates (height, width) along and across a random direction."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    angle = rng.uniform(0, math.pi)
    return math.cos(angle) * x + math.sin(angle) * y, math.cos(angle) * y - math.sin(angle) * x


def _surface(
    rng: np.random.Generator, style: Style, texture: str, colour: Array, height: int, width: int
) -> Array:
    """(height, width, 3) float32 RGB: a surface of one colour; the pattern lightens or darkens it."""
    u, v = _turned(rng, height, width)
    pattern = _TEXTURES[texture](rng, u, v, max(4.0, 0.3 * style.period * max(height, width)))
    pattern = pattern if pattern.dtype.kind == "f" else pattern.astype(np.float32)
    bright = float(colour @ np.asarray([0.3, 0.59, 0.11])) > 115
    other = colour * 0.55 if bright else colour * 0.45 + 255 * 0.55
    return colour + (other - colour) * (0.8 * style.contrast * pattern[..., None])


def _background(
    rng: np.random.Generator, style: Style, kind: str, colour: Array, height: int, width: int
) -> Array:
    """(height, width, 3) float32 RGB: a textured ground with weak contrast."""
    u, v = _turned(rng, height, width)
    period = rng.uniform(0.05, 0.12) * style.period * min(height, width)
    light = 14 * _blobs(rng, u.shape, 2)
    light += style.contrast * _GROUNDS[kind](rng, u, v, period)
    return colour + light[..., None] + rng.normal(0, 6, 3)


def _paint(
    rng: np.random.Generator,
    style: Style,
    canvas: Array,
    polygons: list[Polygon],
    colour: Array,
    texture: str,
) -> None:
    """Paint polygons into `canvas` (H, W, 3) float32 in place, with soft edges."""
    corners = np.concatenate(polygons)
    x0, y0 = np.maximum(np.floor(corners.min(0)).astype(int) - 1, 0)
    x1, y1 = np.minimum(np.ceil(corners.max(0)).astype(int) + 1, (canvas.shape[1], canvas.shape[0]))
    width, height = int(x1 - x0), int(y1 - y0)
    fine = rasterise([(polygon - (x0, y0)) * 3 for polygon in polygons], height * 3, width * 3)
    cover = fine.reshape(height, 3, width, 3).mean(axis=(1, 3), dtype=np.float32)[..., None]
    crop = canvas[y0:y1, x0:x1]
    crop += cover * (_surface(rng, style, texture, colour, height, width) - crop)


def _place(
    rng: np.random.Generator, name: str, extent: float, centre: tuple[float, float], tilt: float
) -> list[Polygon]:
    """The outline of `name` in pixels: `extent` is half its side; it is mirrored at random and tilted
    (degrees).
    """
    turn = math.radians(rng.uniform(-tilt, tilt))
    mirror = -1.0 if rng.random() < 0.5 else 1.0
    stretch = extent * np.asarray([mirror * rng.uniform(0.85, 1.15), 1.0])
    rotation = np.asarray([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    return [np.round((polygon * stretch) @ rotation + np.asarray(centre), 2) for polygon in OUTLINES[name]]


def _scatter(rng: np.random.Generator, name: str, height: int, width: int) -> list[Polygon]:
    """A crowd: eight to fifteen tiny copies of one outline close together."""
    side = min(height, width)
    middle = rng.uniform(0.25, 0.75, 2) * (width, height)
    polygons: list[Polygon] = []
    for _ in range(int(rng.integers(8, 16))):
        x, y = middle + rng.normal(0, 0.11 * side, 2)
        polygons += _place(rng, name, side * rng.uniform(0.028, 0.04), (float(x), float(y)), 25)
    return polygons


def _area(polygon: Polygon) -> float:
    x, y = polygon.T
    return abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))) / 2


def _add(
    rng: np.random.Generator, style: Style, canvas: Array, category: int, polygons: list[Polygon]
) -> Shape:
    """Paint a shape of its usual or a random colour and of a random texture, and describe it.

    A usual colour makes the task learnable in minutes, as yellow helps with bananas; it differs between the
    styles.
    """
    colours = list(style.colours)
    usual = rng.random() < style.usual_share
    colour = colours[category % len(colours)] if usual else str(rng.choice(colours))
    texture = str(rng.choice(style.textures))
    _paint(rng, style, canvas, polygons, np.asarray(style.colours[colour], np.float32), texture)
    visible = rasterise(polygons, canvas.shape[0], canvas.shape[1])
    return Shape(category, colour, texture, polygons, int(visible.sum()), visible)


def draw_scene(
    rng: np.random.Generator, style: Style, height: int, width: int, *, max_shapes: int = MAX_SHAPES
) -> Scene:
    """Draw a random image with everything that is known about it.

    About 5 % of the images have no shapes, 6 % a crowd. Later shapes cover earlier ones, but each keeps at
    least half of its pixels, and shapes that reach over the border lose at most a fifth.

    Args:
        max_shapes: from one to so many, one as likely as the other. Where there may be more than MAX_SHAPES,
        they are
            smaller, so that together they fill as much.
    """
    ground, kind = str(rng.choice(list(style.background_colours))), str(rng.choice(style.backgrounds))
    ground_colour = np.asarray(style.background_colours[ground], np.float32)
    canvas = _background(rng, style, kind, ground_colour, height, width)
    count = math.ceil(max_shapes * rng.random()) if rng.random() >= EMPTY_SHARE else 0
    crowd: Shape | None = None
    shapes: list[Shape] = []
    if rng.random() < CROWD_SHARE:
        category = style.shapes[int(rng.integers(len(style.shapes)))]
        crowd = _add(rng, style, canvas, category, _scatter(rng, NAMES[category], height, width))
    size = math.sqrt(min(1.0, MAX_SHAPES / max_shapes)) if max_shapes else 0.0
    for _ in range(count):
        for _attempt in range(12):
            category = style.shapes[int(rng.integers(len(style.shapes)))]
            polygons, full = _somewhere(rng, category, height, width, size)
            area = sum(_area(polygon) for polygon in polygons)
            if full.sum() >= 0.85 * area and all((s.visible & ~full).sum() >= 0.7 * s.whole for s in shapes):
                below = [*shapes, *([crowd] if crowd else [])]
                for shape in below:
                    shape.visible[full] = False
                shapes.append(_add(rng, style, canvas, category, polygons))
                break
    if crowd is not None and not crowd.visible.any():  # wholly painted over: nobody could see or name it
        crowd = None
    if style.grain:
        canvas += rng.normal(0, style.grain, canvas.shape)
    image = np.clip(np.rint(canvas), 0, 255).astype(np.uint8)
    return Scene(image, f"{kind} {ground} background", shapes, crowd)


def _somewhere(
    rng: np.random.Generator, category: int, height: int, width: int, size: float
) -> tuple[list[Polygon], Array]:
    """Outlines of a shape of random size (times `size`) and place, and its pixels (height, width) bool."""
    extent = min(height, width) * size * rng.uniform(*EXTENT)
    centre = (
        rng.uniform(0.6 * extent, width - 0.6 * extent),
        rng.uniform(0.6 * extent, height - 0.6 * extent),
    )
    polygons = _place(rng, NAMES[category], extent, centre, TILT)
    return polygons, rasterise(polygons, height, width)
