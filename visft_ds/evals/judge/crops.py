"""Parts of images that published protocols teach with: what a view of an image is, and what all their crops
share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as pixels_of

from visft_ds.evals.judge.dense_sets import DenseSet

NO_CLASS = -1  #: number of a pixel without a class, in labels as tensors


@dataclass(frozen=True)
class View:
    """What an encoder takes."""

    side: int  #: pixels of a square
    mean: Sequence[float]  #: of RGB in [0, 1]
    std: Sequence[float]

    def normalised(self, image: Image.Image | Tensor) -> Tensor:
        """(3, H, W) of an image, a picture or a tensor of bytes."""
        pixels = pixels_of.pil_to_tensor(image) if isinstance(image, Image.Image) else image
        normed: Tensor = pixels_of.normalize(
            pixels_of.to_dtype(pixels, torch.float32, scale=True), list(self.mean), list(self.std)
        )
        return normed


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
