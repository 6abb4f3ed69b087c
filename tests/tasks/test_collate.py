"""Batches: padding, packing, and what is missing where only pixels or only labels are read."""

from __future__ import annotations

import numpy as np
import torch

from visft_ds.data.samples import Sample
from visft_ds.tasks.transform import collate_joint


def _sample(index: int, size: tuple[int, int], objects: int, *, pixels: bool = True, labels: bool = True) -> Sample:
    boxes = np.full((objects, 4), 0.1 * index, dtype=np.float32)
    targets = {"detection": {"boxes": boxes, "labels": np.arange(objects, dtype=np.int64) + 10 * index}}
    image = torch.full((3, *size), 100 + index, dtype=torch.uint8) if pixels else None
    return Sample(index, 500 + index, (9, 9), size, image, 70 + index, targets if labels else {})


def test_images_are_padded_right_and_bottom_and_boxes_packed() -> None:
    batch = collate_joint([_sample(1, (4, 7), 2), _sample(2, (6, 5), 0), _sample(3, (2, 2), 1)])
    assert batch.images.shape == (3, 3, 6, 7) and batch.images.dtype == torch.uint8
    for place, (height, width) in enumerate(batch.sizes.tolist()):
        assert (batch.images[place, :, :height, :width] == 101 + place).all()
        assert batch.images[place].sum() == 3 * height * width * (101 + place), "padding must be 0"
    targets = batch.targets["detection"]
    assert targets.counts.tolist() == [2, 0, 1]
    assert targets.labels.tolist() == [10, 11, 30] and targets.labels.dtype == torch.int64
    assert targets.boxes.shape == (3, 4) and targets.boxes.dtype == torch.float32
    assert batch.indices.tolist() == [1, 2, 3] and batch.image_ids.tolist() == [501, 502, 503]
    assert batch.random_keys.tolist() == [71, 72, 73] and batch.random_keys.dtype == torch.int64
    assert batch.original_sizes.tolist() == [[9, 9]] * 3 and batch.real.all()
