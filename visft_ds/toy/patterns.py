"""Patterns of surfaces and grounds: brightness as a function of the place.

Shape letters: H W pixels. `u` and `v` (H, W) are coordinates in pixels along and across a random direction;
`period` is in pixels.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

Array = npt.NDArray[Any]


def directions(rng: np.random.Generator, height: int, width: int) -> tuple[Array, Array]:
    """Coordinates (height, width) along and across a random direction."""
    y, x = _pixels((height, width))
    angle = rng.uniform(0, math.pi)
    cosine = math.cos(angle)
    sine = math.sin(angle)
    along = cosine * x + sine * y
    across = cosine * y - sine * x
    return along, across


def blobs(rng: np.random.Generator, shape: tuple[int, ...], cells: int) -> Array:
    """(height, width) smooth noise in about [-1, 1] with roughly `cells` bumps a side."""
    height, width = shape
    coarse = rng.uniform(-1, 1, (cells + 1, cells + 1)).astype(np.float32)
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(smooth)


def texture(
    name: str,
    rng: np.random.Generator,
    u: Array,
    v: Array,
    period: float,
) -> Array:
    """Pattern (H, W) of a shape's surface: 0 is its colour, 1 the lighter or darker one."""
    column = u / period
    row = v / period
    match name:
        case "plain":
            return np.zeros_like(u)
        case "striped":
            return column % 1 < 0.4
        case "dotted":
            return _squared_distance(column, row) < 0.07
        case "shaded":
            length = 2.2 * max(u.shape)
            slope = np.clip(0.5 + u / length, 0, 1)
            return 0.9 * slope
        case "checked":
            left = column % 1 < 0.5
            upper = row % 1 < 0.5
            return left != upper
        case "wavy":
            bend = 0.25 * period * np.sin(4 * row)
            phase = math.tau * (u + bend) / period
            return 0.5 + 0.5 * np.sin(phase)
        case "speckled":
            return rng.random(u.shape, dtype=np.float32) < 0.18
        case "ringed":
            return _rings(u.shape, 0.7 * period)
        case "hatched":
            period = 0.6 * period
            return _mesh(u / period, v / period, 0.25)
        case "zigzag":
            shift = np.abs(2 * (row % 1) - 1)
            return (column + shift) % 1 < 0.4
    assert name == "mottled", name
    return blobs(rng, u.shape, 5) > 0


def ground(
    name: str,
    rng: np.random.Generator,
    u: Array,
    v: Array,
    period: float,
) -> Array:
    """Change of brightness (H, W) of a background, in steps of 8 bits."""
    column = u / period
    row = v / period
    phase = math.tau * u / period
    match name:
        case "cloudy":
            return 22 * blobs(rng, u.shape, 6)
        case "grainy":
            return rng.integers(-24, 25, u.shape, dtype=np.int16)
        case "lined":
            return 14 * np.sin(phase)
        case "tiled":
            return -26 * _joints(u.shape, period)
        case "marbled":
            phase = math.tau * u / (3 * period)
            bend = 5 * blobs(rng, u.shape, 5)
            return 20 * np.sin(phase + bend)
        case "spotted":
            spots = _squared_distance(column, row) < 0.06
            return 22 * spots
        case "quilted":
            return -26 * _mesh(column / 2, row / 2, 0.08)
        case "misty":
            start = u.min()
            length = u.max() - start
            return 45 * (u - start) / length - 30
    assert name == "scratched", name
    bend = 9 * blobs(rng, u.shape, 3)
    scratches = np.sin(phase + bend) > 0.93
    return -24 * scratches


def _pixels(shape: tuple[int, ...]) -> Array:
    """(2, height, width) float32, y and x of each pixel."""
    height, width = shape
    return np.mgrid[0:height, 0:width].astype(np.float32)


def _squared_distance(column: Array, row: Array) -> Array:
    """Squared distance to the middle of a cell; all are in periods."""
    x = column % 1 - 0.5
    y = row % 1 - 0.5
    return x**2 + y**2


def _mesh(column: Array, row: Array, thickness: float) -> Array:
    """Crossing lines; all are in periods."""
    vertical = column % 1 < thickness
    horizontal = row % 1 < thickness
    return vertical | horizontal


def _rings(shape: tuple[int, ...], period: float) -> Array:
    """Rings around the middle."""
    height, width = shape
    y, x = _pixels(shape)
    radius = np.hypot(x - width / 2, y - height / 2)
    return radius / period % 1 < 0.4


def _joints(shape: tuple[int, ...], period: float) -> Array:
    """The joints between bricks, two pixels thick; every second row is shifted by half a brick."""
    y, x = _pixels(shape)
    brick = 2 * period
    shifted = x + np.where(y // brick % 2 < 1, 0, brick)
    between_rows = y % brick < 2
    between_columns = shifted % (4 * period) < 2
    return between_rows | between_columns
