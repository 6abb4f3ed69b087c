"""A small YOLO data set of random pictures, as Roboflow exports them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import simplejpeg

BOX, POLYGON = "0 0.5 0.5 0.5 0.25", "2 0.25 0.25 0.75 0.25 0.75 0.75"
#: Label of each picture, None for a picture without one.
LABELS = (BOX, f"{BOX}\n1 0.25 0.25 0.1 0.1\n", POLYGON, None, "")
DESCRIPTION = "train: ../train/images\nval: ../valid/images\n\nnc: 3\nnames: ['cat', 'yes', 'dog']\n"


def write_picture(path: Path, height: int = 32, width: int = 64, seed: int = 0) -> None:
    """A random JPEG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    path.write_bytes(simplejpeg.encode_jpeg(pixels, quality=60))


def write_yolo(folder: Path, labels: tuple[str | None, ...] = LABELS) -> Path:
    """The same pictures and labels in train/ and valid/. Returns the data.yaml."""
    for split in ("train", "valid"):
        (folder / split / "labels").mkdir(parents=True)
        for index, label in enumerate(labels):
            write_picture(folder / split / f"images/{index}.jpg", seed=index)
            if label is not None:
                (folder / split / f"labels/{index}.txt").write_text(label)
    (folder / "data.yaml").write_text(DESCRIPTION)
    return folder / "data.yaml"
