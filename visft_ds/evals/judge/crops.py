"""Crops of images that published protocols teach with: what all of them share. Random numbers are torch's
global ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, RandomSampler, default_collate

from visft_ds.evals.judge.dense_sets import DenseSet
from visft_ds.evals.judge.encoding import Settings

NO_CLASS = -1  #: number of a pixel without a class, in labels as tensors


def label_of(data: DenseSet, number: int) -> Tensor:
    """(H, W) int64 class numbers of an image, NO_CLASS where it has none; or float32 metres where depth is
    asked.
    """
    label = data.label(number)
    if not data.classes:
        return torch.from_numpy(np.ascontiguousarray(label, dtype=np.float32))
    numbers = torch.from_numpy(label.astype(np.int64))
    return numbers.masked_fill_(numbers >= len(data.classes), NO_CLASS)


def short_side(size: Sequence[int], side: int) -> tuple[int, int]:
    """(height, width) of an image whose shorter side becomes `side` pixels, the other one rounded."""
    height, width = size
    if height > width:
        return int(side * height / width + 0.5), side
    return side, int(side * width / height + 0.5)


def rounds(images: int, count: int) -> Tensor:
    """(count,) numbers of images, in rounds over all of them, each in another order."""
    generator = torch.Generator().manual_seed(0)
    sampler = RandomSampler(range(images), num_samples=count, generator=generator)
    return torch.from_numpy(np.fromiter(sampler, dtype=np.int64, count=count))


def random_crops(
    order: Tensor, size: int, crop: Callable[[int], tuple[Any, ...]], settings: Settings
) -> Iterable[Any]:
    """Batches (numbers of images, *crops) that worker processes make, ahead; the n-th crop is the same for
    every model.

    Args:
        order: (n,) numbers of images.
        crop: number of an image -> a random crop and what belongs to it.
    """

    def batch(turns: Sequence[int]) -> Any:
        crops = []
        for turn in turns:
            number = int(order[turn])
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(turn)
                crops.append((number, *crop(number)))
        return default_collate(crops)

    workers = settings.threads  # are forked: readers of images are closures, which no pipe takes
    return DataLoader(
        range(len(order)),  # type: ignore[arg-type]  # whatever has a length and numbered items
        size,
        num_workers=workers,
        collate_fn=batch,
        multiprocessing_context="fork" if workers else None,
    )


def coin() -> bool:
    """Return True in half of the cases."""
    return bool(torch.rand(()) < 0.5)


def random_part(size: Sequence[int], crop_size: Sequence[int]) -> tuple[slice, slice]:
    """Rows and columns of a random part (height, width) of an image, or all of those that are fewer."""
    height, width = crop_size
    spare_rows = max(size[0] - height, 0)
    spare_columns = max(size[1] - width, 0)
    top = int(torch.randint(spare_rows + 1, ()))
    left = int(torch.randint(spare_columns + 1, ()))
    return slice(top, top + height), slice(left, left + width)


def filled_up(image: Tensor, size: Sequence[int], value: float = 0) -> Tensor:
    """(..., H, W) on its right and below, so that it has at least a size."""
    height, width = size
    below = max(0, height - image.shape[-2])
    right = max(0, width - image.shape[-1])
    return F.pad(image, [0, right, 0, below], value=value)
