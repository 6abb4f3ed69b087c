"""Small data sets with depth maps: slopes whose brightness says how far they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def slope(seed: int, height: int = 48, width: int = 64) -> np.ndarray:
    """(H, W) float64 metres from 1 to 6, with a nearer box and a void row."""
    draw = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    metres = 2 + 4 * (draw.random() * rows / height + draw.random() * columns / width) / 2
    top, left = draw.integers(0, height // 2), draw.integers(0, width // 2)
    metres[top : top + height // 3, left : left + width // 3] = draw.uniform(1, 2)
    metres[0] = 0
    return metres


def write_depth(folder: Path, train: int = 8, val: int = 4, unit: str | None = None) -> Path:
    """`images/SPLIT` and `depth/SPLIT`, of two sizes; in `unit`, or relative: the inverse."""
    metres_of_number = 0.001 if unit in (None, "relative") else float(unit)
    for split, count in {"train": train, "val": val}.items():
        for kind in ("images", "depth"):
            (folder / kind / split).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            metres = slope(number, *((48, 64) if number % 2 else (64, 40)))
            shade = (metres * 40).astype(np.uint8)
            name = f"{number}{split}.png"
            Image.fromarray(np.stack([shade, 255 - shade, shade // 2], axis=-1)).save(
                folder / "images" / split / name
            )
            values = metres / metres_of_number
            if unit == "relative":
                values = np.divide(9000, metres, where=metres > 0, out=np.zeros_like(metres)) + 100 * (
                    metres > 0
                )
            Image.fromarray(values.round().astype(np.uint16)).save(folder / "depth" / split / name)
    if unit is not None:
        (folder / "depth/unit.txt").write_text(unit)
    return folder
