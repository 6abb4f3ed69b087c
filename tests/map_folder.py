"""Small data sets with label maps, of two bands with a third class between them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

SHADES = np.array([[40, 90, 200], [60, 160, 60], [210, 40, 40]], dtype=np.uint8)


def bands(seed: int, height: int = 48, width: int = 64) -> np.ndarray:
    """(H, W) uint8 of classes 0, 1, 2."""
    draw = np.random.default_rng(seed)
    numbers = np.zeros((height, width), dtype=np.uint8)
    numbers[draw.integers(height // 3, height // 2) :] = 1
    top, left = draw.integers(0, height // 2), draw.integers(0, width // 2)
    numbers[top : top + height // 3, left : left + width // 3] = 2
    return numbers


def write_pair(image: Path, map_: Path, numbers: np.ndarray, classes: np.ndarray | None = None) -> None:
    """A picture of a map and the map; `classes` are the numbers in its file."""
    for path in (image, map_):
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(SHADES[numbers]).save(image)
    Image.fromarray(numbers if classes is None else classes[numbers]).save(map_)


def write_own(folder: Path, train: int = 8, val: int = 4) -> Path:
    """A data set of one's own; the first row of each map has no class."""
    for split, count in {"train": train, "val": val}.items():
        for number in range(count):
            size = (48, 64) if number % 2 else (64, 40)
            name, numbers = f"{number}{split}", bands(number, *size)
            write_pair(folder / f"images/{split}/{name}.png", folder / f"labels/{split}/{name}.png", numbers)
            numbers[0] = 255
            Image.fromarray(numbers).save(folder / f"labels/{split}/{name}.png")
    (folder / "classes.txt").write_text("sky\nmeadow\nhouse\n")
    return folder
