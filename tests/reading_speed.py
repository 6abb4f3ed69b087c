"""Speed of reading, side by side: ours, plain webdataset, and torchvision's CocoDetection.

    visft shards PHOTOS --out SHARDS
    python -m tests.reading_speed PHOTOS SHARDS         PHOTOS: images and their COCO labels, as downloaded

Each gives batches of ten images of 448 x 448 pixels with boxes, a half of them mirrored, decoded by Pillow in
this process. Rounds are taken in turn; samples per CPU second, and how many times as fast ours is.
"""

from __future__ import annotations

import io
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import CocoDetection

from visft_ds.data.open_webdataset import open_split
from visft_ds.data.shards import Manifest
from visft_ds.prepare.settle import settle
from visft_ds.profiling.measure import loader_of, open_run_data
from visft_ds.run.machine import check_machine

SIDE = 448
BATCH = 10
ROUNDS = 5


def main(photos: Path, shards: Path) -> None:
    """Print a table of the three."""
    manifest = Manifest.load(shards, "train")
    steps = len(manifest) // BATCH
    readers: dict[str, Callable[[], Iterable[Any]]] = {
        "ours": lambda: our_batches(shards, steps),
        "webdataset": lambda: DataLoader(
            open_split(manifest).map(from_webdataset), batch_size=BATCH, collate_fn=collate
        ),
        "CocoDetection": lambda: DataLoader(
            Folder(photos / "train2017", photos / "annotations/instances_train2017.json"),
            batch_size=BATCH,
            shuffle=True,
            collate_fn=collate,
        ),
    }
    speeds: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(ROUNDS):
        for name, read in readers.items():
            speeds[name].append(samples_per_cpu_second(read(), steps))
    ours = statistics.median(speeds["ours"])
    for name, values in speeds.items():
        median = statistics.median(values)
        spread = f"{min(values):.0f} to {max(values):.0f}"
        print(f"{name:14} {median:6.0f} samples per CPU second ({spread}); ours {ours / median:.2f} times")


def samples_per_cpu_second(batches: Iterable[Any], steps: int) -> float:
    """Speed of `steps` batches, after one that opens files."""
    iterator = iter(batches)
    next(iterator)
    began = time.process_time()
    for _ in range(steps - 1):
        next(iterator)
    return (steps - 1) * BATCH / (time.process_time() - began)


def our_batches(shards: Path, steps: int) -> Iterator[Any]:
    """Batches of detection as a training meets them."""
    flags = ["--stage", "1", "--model", "debug", "--data", str(shards), "--tasks", "detection"]
    settings = {
        "visft.mode": "sampled",
        "visft.data.num_workers": 0,
        "visft.tasks.detection.batch_size": BATCH,
        "visft.tasks.detection.micro_batch": BATCH,
        "visft.tasks.detection.image.fixed_size": SIDE,
        "visft.tasks.detection.image.flip": 0.5,
    }
    for key, value in settings.items():
        flags += ["--set", f"{key}={value}"]
    with open_run_data(settle(flags).config, synthetic=False) as (config, data):
        with closing(loader_of(config, data, "detection", check_machine(config))) as loader:
            for _, batches in loader.steps(0, steps):
                yield from batches


def from_webdataset(sample: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Image and boxes of a sample of our shards, as a pipeline of one's own makes them."""
    labels = json.loads(sample["json"])
    objects = labels["annotations"]
    name = next(name for name in ("jpg", "jpeg", "png") if name in sample)
    with Image.open(io.BytesIO(sample[name])) as image:
        return prepared(image, [entry["bbox"] for entry in objects])


class Folder(CocoDetection):
    """torchvision's reader, with the same size, mirror and boxes."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image, objects = super().__getitem__(index)
        return prepared(image, [entry["bbox"] for entry in objects])


def prepared(image: Image.Image, boxes: list[list[float]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels (3, 448, 448) uint8 and boxes (N, 4), corners in pixels, of which a half is mirrored."""
    width, height = image.size
    pixels = torch.from_numpy(np.array(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR)))
    corners = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    corners[:, 2:] += corners[:, :2]
    corners *= torch.tensor([SIDE / width, SIDE / height]).repeat(2)
    pixels = pixels.permute(2, 0, 1)
    if torch.rand(()) < 0.5:
        pixels = pixels.flip(-1)
        corners[:, [0, 2]] = SIDE - corners[:, [2, 0]]
    return pixels.contiguous(), corners


def collate(samples: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Batch of images (B, 3, 448, 448), and the boxes of each."""
    images, boxes = zip(*samples, strict=True)
    return torch.stack(images), list(boxes)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
