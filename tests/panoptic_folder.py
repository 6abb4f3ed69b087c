"""Small data sets with panoptic maps: two bands of stuff, two boxes of one class, a crowd and a void row."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import orjson
from PIL import Image

CATEGORIES = [
    {"id": 7, "name": "box", "isthing": 1},
    {"id": 2, "name": "sky", "isthing": 0},
    {"id": 300, "name": "ground", "isthing": 0},
]
SHADES = np.array([[0, 0, 0], [40, 90, 200], [60, 160, 60], [210, 40, 40], [230, 60, 60], [120, 0, 0]])
#: Numbers of the segments of an image, by their places from 1; 0 is void.
NUMBERS = np.array([0, 5, 70_000, 9, 3_000_000, 12])
_CATEGORY_OF = {5: 2, 70_000: 300, 9: 7, 3_000_000: 7, 12: 7}


def places(seed: int, height: int, width: int) -> np.ndarray:
    """(H, W) places of the segments."""
    draw = np.random.default_rng(seed)
    numbers = np.ones((height, width), dtype=np.int64)
    numbers[draw.integers(height // 3, height // 2) :] = 2
    for place in (3, 4):
        top, left = draw.integers(0, height // 2), draw.integers(0, width // 2)
        numbers[top : top + height // 3, left : left + width // 3] = place
    numbers[-4:, : width // 2] = 5  # the crowd
    numbers[0] = 0
    return numbers


def png_of(numbers: np.ndarray) -> Image.Image:
    """An RGB picture of numbers."""
    colours = np.stack([numbers % 256, numbers // 256 % 256, numbers // 65_536], axis=-1)
    return Image.fromarray(colours.astype(np.uint8))


def write_panoptic(folder: Path, train: int = 6, val: int = 2, cityscapes: bool = False) -> Path:
    """COCO's layout, or Cityscapes'."""
    number = 10
    for split, count in {"train": train, "val": val}.items():
        images, annotations = [], []
        path = folder / f"annotations/panoptic_{split}2017.json"
        photos = folder / f"{split}2017"
        if cityscapes:
            path = folder / f"gtFine/cityscapes_panoptic_{split}.json"
            photos = folder / f"leftImg8bit/{split}/ulm"
        maps = path.with_suffix("")
        for each in (photos, maps):
            each.mkdir(parents=True)
        for seed in range(count):
            number += 1
            size = (48, 64) if seed % 2 else (64, 40)
            segments = places(number, *size)
            id_: object = number
            photo, listed, png = f"{number:012d}.png", f"{number:012d}.png", f"{number:012d}.png"
            if cityscapes:
                id_ = f"ulm_{number}"
                photo, listed = f"{id_}_leftImg8bit.png", f"{id_}_gtFine_leftImg8bit.png"
                png = f"{id_}_gtFine_panoptic.png"
            Image.fromarray(SHADES[segments].astype(np.uint8)).save(photos / photo)
            png_of(NUMBERS[segments]).save(maps / png)
            infos = []
            for segment in NUMBERS[np.unique(segments)].tolist():
                if segment:
                    category = _CATEGORY_OF[segment]
                    infos.append({"id": segment, "category_id": category, "iscrowd": int(segment == 12)})
            images.append({"id": id_, "file_name": listed, "height": size[0], "width": size[1]})
            annotations.append({"image_id": id_, "file_name": png, "segments_info": infos})
        content = {"images": images, "annotations": annotations, "categories": CATEGORIES}
        path.write_bytes(orjson.dumps(content))
    return folder
