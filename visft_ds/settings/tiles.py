"""Tiles: windows of one size that pictures are cut into when they are read, so that small objects stay large.

A tile is a sample of its own: the number of a sample is that of its picture in the index of the split, plus
the size of the index for each tile of that picture before it. Tiles of a picture are counted row by row.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

#: Allowed sides of tiles in pixels, the least and the most.
SIDES = (32, 8192)
#: Part of an object's box, or of as much of it as tiles can show, that a tile has to show, else the object is
#: left out of it.
LEAST_VISIBLE = 0.4


class Window(NamedTuple):
    """Part of a picture, in pixels."""

    top: int
    left: int
    height: int
    width: int


class Tiles(NamedTuple):
    """Squares of `side` pixels that pictures are cut into, neighbours with at least `overlap` in common.

    Along a side of a picture they are as few as cover it, evenly spaced; a tile is no larger than its
    picture.
    """

    side: int
    overlap: int

    def windows(self, height: int, width: int) -> list[Window]:
        """The tiles of a picture, row by row."""
        tile_height = min(self.side, height)
        tile_width = min(self.side, width)
        return [
            Window(top, left, tile_height, tile_width)
            for top in self._starts(height)
            for left in self._starts(width)
        ]

    def _starts(self, length: int) -> list[int]:
        """First pixels of the tiles along a side of a picture."""
        count = int(self._counts(np.array(length)))
        step = (length - self.side) / max(1, count - 1)
        return [round(number * step) for number in range(count)]

    def _counts(self, lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Number of tiles along sides of these lengths."""
        beyond_first = (lengths - self.side).clip(min=0)
        return 1 + -(-beyond_first // (self.side - self.overlap))

    def samples(self, index: npt.NDArray[Any], pictures: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Numbers of all tiles of some pictures of a split, picture by picture."""
        heights = index["height"][pictures].astype(np.int64)
        widths = index["width"][pictures].astype(np.int64)
        counts = self._counts(heights) * self._counts(widths)
        firsts = np.cumsum(counts) - counts
        tiles = np.arange(counts.sum()) - np.repeat(firsts, counts)
        return np.repeat(pictures, counts) + tiles * len(index)


def usual_overlap(side: int, object_side: float = 0.0) -> int:
    """Overlap of tiles in which objects of up to `object_side` pixels are whole somewhere, from a quarter to
    half of the tile.
    """
    return min(max(math.ceil(object_side), side // 4), side // 2)


def is_visible(box: Any, window: Window) -> bool:
    """Return True if the window shows enough of a box (x, y, width, height) of the picture.

    Of one larger than the window that is as if it had the window's size: else no tile would teach it, and all
    would teach that it is background.
    """
    x, y, width, height = box
    shown_width = min(x + width, window.left + window.width) - max(x, window.left)
    shown_height = min(y + height, window.top + window.height) - max(y, window.top)
    shown = max(0.0, shown_width) * max(0.0, shown_height)
    most = min(width, window.width) * min(height, window.height)
    return bool(shown > 0 and shown >= LEAST_VISIBLE * most)
