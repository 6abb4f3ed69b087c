"""The categories of the drawings and their outlines.

Shape letters: P polygon corners.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

Polygon = npt.NDArray[np.float64]  # (P, 2) x, y

#: Name -> category id. The ids have holes and are not in alphabetical order, as COCO's.
CATEGORY_IDS = {
    "circle": 1,
    "ring": 3,
    "crescent": 4,
    "heart": 8,
    "square": 13,
    "triangle": 17,
    "bar": 27,
    "hourglass": 34,
    "star": 52,
    "cross": 61,
    "arrow": 78,
    "bolt": 90,
}
NAMES = tuple(CATEGORY_IDS)

#: Corners (x, y) of the outlines without curves.
_CORNERS: Mapping[str, Sequence[tuple[float, float]]] = {
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(0, -0.95), (1, 0.8), (-1, 0.8)],
    "bar": [(-1, -0.32), (1, -0.32), (1, 0.32), (-1, 0.32)],
    "hourglass": [
        (-0.8, -1),
        (0.8, -1),
        (0.14, 0),
        (0.8, 1),
        (-0.8, 1),
        (-0.14, 0),
    ],
    "cross": [
        (-0.33, -0.98),
        (0.33, -0.98),
        (0.33, -0.33),
        (0.98, -0.33),
        (0.98, 0.33),
        (0.33, 0.33),
        (0.33, 0.98),
        (-0.33, 0.98),
        (-0.33, 0.33),
        (-0.98, 0.33),
        (-0.98, -0.33),
        (-0.33, -0.33),
    ],
    "arrow": [
        (-1, -0.28),
        (0.1, -0.28),
        (0.1, -0.85),
        (1, 0),
        (0.1, 0.85),
        (0.1, 0.28),
        (-1, 0.28),
    ],
    "bolt": [
        (-0.15, -1),
        (0.65, -1),
        (0.25, -0.25),
        (0.75, -0.25),
        (-0.45, 1),
        (-0.1, 0.12),
        (-0.65, 0.12),
    ],
}


def _arc(start: float, stop: float, radius: float = 1.0, corners: int = 24) -> Polygon:
    """Corners on a circle around the origin, from one angle to another in degrees."""
    angles = np.linspace(math.radians(start), math.radians(stop), corners)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1) * radius


def _outline(name: str) -> list[Polygon]:
    """The outline of a category in the square [-1, 1]^2, y down.

    A ring has two parts, because COCO's polygons have no holes.
    """
    match name:
        case "circle":
            return [_arc(0, 345, 0.95)]
        case "ring":
            # The halves overlap by a few degrees so that rounding leaves no seam between them.
            left = [_arc(86, 274, 1.0, 20), _arc(274, 86, 0.52, 20)]
            right = [_arc(266, 454, 1.0, 20), _arc(454, 266, 0.52, 20)]
            return [np.concatenate(left), np.concatenate(right)]
        case "crescent":
            # Blunt horns: sharp ones would be thinner than a pixel and vanish from the mask.
            outer = _arc(72.5, 287.5)
            inner = _arc(264, 96, 0.78) + np.array([0.38, 0])
            return [np.concatenate([outer, inner]) + np.array([0.35, 0])]
        case "heart":
            t = np.linspace(0, 2 * math.pi, 32, endpoint=False)
            x = 16 * np.sin(t) ** 3
            y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
            return [np.stack([x, -y - 2.5], axis=1) / 16]
        case "star":
            corners = np.arange(10)
            angles = corners * math.pi / 5 - math.pi / 2
            radius = np.where(corners % 2 == 0, 1.05, 0.45)
            return [np.stack([np.cos(angles), np.sin(angles)], axis=1) * radius[:, None]]
        case _:
            return [np.array(_CORNERS[name], dtype=np.float64)]


OUTLINES = {name: _outline(name) for name in NAMES}
