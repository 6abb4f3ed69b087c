"""Ray-traced rooms with spheres and boxes, and the exact depth of every pixel.

The camera stands level in a room of a floor, a ceiling and three walls. x points right, y down, z ahead, in
metres; a ray is (x, y, 1) times the depth. Shape letters: H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from visft_ds.toy.patterns import Array
from visft_ds.toy.scenes import Scene, Shape

#: Categories of the objects -> ids.
CATEGORY_IDS = {"sphere": 1, "box": 2}
#: Those of the room itself, which are stuff.
STUFF_IDS = {"floor": 3, "ceiling": 4, "wall": 5}
WALLS = (3, 4, 5)  #: numbers of the surfaces that are walls
_COLOURS = {
    "red": (0.85, 0.2, 0.15),
    "green": (0.2, 0.65, 0.25),
    "blue": (0.2, 0.35, 0.85),
    "yellow": (0.9, 0.8, 0.2),
    "white": (0.9, 0.9, 0.9),
}
_FOCAL = 0.9  # of the longer side
_FLOOR = 1.4  # metres below the camera
_CEILING = -1.2
_LIGHT = np.array([-0.4, -0.8, -0.45])  # towards it
_NOISE = 0.015
_LEAST = 30  # visible pixels of an object


@dataclass(frozen=True)
class _Surface:
    """Part of a scene, as far as rays meet it."""

    depth: Array  #: (H, W) metres, infinite where a ray misses it
    normal: Array  #: (H, W, 3)
    colour: Array  #: (H, W, 3) in [0, 1]
    category: str
    name: str = ""  #: of its colour


@dataclass(frozen=True)
class Room:
    """A picture with all that is known of it."""

    scene: Scene
    depth: Array  #: (H, W) float32 metres
    numbers: Array  #: (H, W) int64, number of the surface that each pixel shows, from 1
    categories: Sequence[str]  #: of each surface; the floor, the ceiling and three walls are the first


def draw_room(rng: np.random.Generator, height: int, width: int) -> Room:
    """A random room with one to four objects."""
    rows, columns = np.mgrid[:height, :width]
    focal = _FOCAL * max(height, width)
    x = (columns + 0.5 - width / 2) / focal
    y = (rows + 0.5 - height / 2) / focal
    rays = np.stack([x, y, np.ones_like(x)], axis=-1)
    surfaces = [*_walls(rng, rays), *_objects(rng, rays)]
    depths = np.stack([surface.depth for surface in surfaces])
    nearest = depths.argmin(axis=0)
    depth = depths.min(axis=0)
    pixels = np.zeros((height, width, 3))
    shapes = list[Shape]()
    for number, surface in enumerate(surfaces):
        visible = nearest == number
        brightness = 0.35 + 0.65 * (surface.normal @ _LIGHT).clip(0)
        pixels[visible] = (surface.colour * brightness[..., None])[visible]
        if surface.category in CATEGORY_IDS and visible.sum() >= _LEAST:
            inside = int(np.isfinite(surface.depth).sum())
            shapes.append(Shape(surface.category, surface.name, "plain", (), inside, visible))
    pixels += rng.normal(0, _NOISE, pixels.shape)
    image = (pixels.clip(0, 1) * 255).round().astype(np.uint8)
    scene = Scene(image, "room", shapes, None)
    categories = [surface.category for surface in surfaces]
    return Room(scene, depth.astype(np.float32), nearest + 1, categories)


def _walls(rng: np.random.Generator, rays: Array) -> Iterator[_Surface]:
    """Floor, ceiling, two sides and the end of a room."""
    planes = [
        (1, _FLOOR),
        (1, _CEILING),
        (0, rng.uniform(1.5, 3)),
        (0, -rng.uniform(1.5, 3)),
        (2, rng.uniform(5, 9)),
    ]
    for axis, distance in planes:
        with np.errstate(divide="ignore"):
            depth = distance / rays[..., axis]
        depth = np.where(depth > 0, depth, np.inf)
        normal = np.zeros_like(rays)
        normal[..., axis] = -np.sign(distance)
        colour = np.broadcast_to(rng.uniform(0.45, 0.85, 3), rays.shape)
        if distance == _FLOOR:
            points = rays * np.where(np.isfinite(depth), depth, 0)[..., None]
            tiles = np.floor(points[..., 0] * 1.5) + np.floor(points[..., 2] * 1.5)
            colour = np.where((tiles % 2 == 0)[..., None], colour, colour * 0.6)
        category = "wall"
        if axis == 1:
            category = "floor" if distance == _FLOOR else "ceiling"
        yield _Surface(depth, normal, colour, category)


def _objects(rng: np.random.Generator, rays: Array) -> Iterator[_Surface]:
    """Spheres and boxes that stand on the floor."""
    for _ in range(int(rng.integers(1, 5))):
        name = str(rng.choice(list(_COLOURS)))
        colour = np.broadcast_to(_COLOURS[name], rays.shape)
        half = rng.uniform(0.25, 0.6, 3)
        away = rng.uniform(2, 4.5)
        centre = np.array([rng.uniform(-0.35, 0.35) * away, _FLOOR - half[1], away])
        if rng.random() < 0.5:
            centre[1] = _FLOOR - half[0]
            yield _sphere(rays, centre, half[0], colour, name)
        else:
            yield _box(rays, centre, half, colour, name)


def _sphere(rays: Array, centre: Array, radius: float, colour: Array, name: str) -> _Surface:
    # |depth * ray - centre| = radius: a quadratic equation in the depth
    squared = (rays**2).sum(axis=-1)
    along = rays @ centre
    discriminant = along**2 - squared * (centre @ centre - radius**2)
    depth = np.where(discriminant > 0, (along - np.sqrt(discriminant.clip(0))) / squared, np.inf)
    points = rays * np.where(np.isfinite(depth), depth, 0)[..., None]
    return _Surface(depth, (points - centre) / radius, colour, "sphere", name)


def _box(rays: Array, centre: Array, half: Array, colour: Array, name: str) -> _Surface:
    # a ray is inside between the last side that it enters and the first one that it leaves
    with np.errstate(divide="ignore"):
        bounds = np.stack([(centre - half) / rays, (centre + half) / rays])
    entries = bounds.min(axis=0)
    enters = entries.max(axis=-1)
    leaves = bounds.max(axis=0).min(axis=-1)
    depth = np.where((enters < leaves) & (enters > 0), enters, np.inf)
    side = entries.argmax(axis=-1)[..., None]
    normal = np.zeros_like(rays)
    np.put_along_axis(normal, side, -np.sign(np.take_along_axis(rays, side, axis=-1)), axis=-1)
    return _Surface(depth, normal, colour, "box", name)
