"""Data structures between shard and head: a sample, then a batch of samples.

Shape letters: B images, H W pixels, N objects of all images, concatenated, D width, h w grid, P tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from visft_ds.data.features import View
from visft_ds.ops import to_device


@dataclass(frozen=True)
class RawSample:
    """Record of a shard after decoding, before any transform.

    `image` is None where a process reads labels only (the last pipeline stage); every transform must then give the
    same targets as with pixels, which is why the image size comes from the index.
    """

    index: int  #: position in the split's index; identifies the sample everywhere
    image_id: int  #: the COCO image id
    size: tuple[int, int]  #: (height, width) in whose pixels the annotations are
    image: npt.NDArray[np.uint8] | None  #: (H, W, 3) RGB
    annotations: Sequence[Mapping[str, Any]]  #: COCO instances as stored in the shard
    captions: Sequence[str]


@dataclass(frozen=True)
class Sample:
    """Transformed sample. `targets` maps a task to that task's per-image labels (a mapping of arrays)."""

    index: int
    image_id: int
    original_size: tuple[int, int]  #: (height, width) before any transform
    size: tuple[int, int]  #: (height, width) after the transforms
    image: Tensor | None  #: (3, H, W) uint8
    random_key: int  #: key of this sample's counter-based random numbers in this step; 0 in evaluation
    targets: Mapping[str, Mapping[str, npt.NDArray[Any]]]
    view: View | None = None  #: with a feature cache; where it has features, `image` is None
    frame: tuple[int, int] | None = None  #: (height, width) of `image` with padding of its own; None: it has none


@dataclass(frozen=True)
class Targets:
    """Labels of a task for a batch: a dataclass of tensors over all objects, and the number of each image."""

    host: ClassVar[tuple[str, ...]] = ()  #: fields that only the host uses: it must not wait for a copy to come back
    #: Arguments of the head besides the maps in training -> the fields that it gets; most heads need none.
    head_inputs: ClassVar[Mapping[str, str]] = {}


@dataclass(frozen=True)
class Batch:
    """Micro-batch. `targets` has an entry for every task that learns from these images.

    A model needs images, sizes, targets and views; all else stays on the host, whatever device the batch is on.
    """

    images: Tensor  #: (B, 3, H, W) uint8, padded right and bottom; (B, 3, 0, 0) where no pixels are read
    sizes: Tensor  #: (B, 2) int64, height and width of the valid part of each image
    original_sizes: Tensor  #: (B, 2) int64, height and width as stored
    indices: Tensor  #: (B,) int64, positions in the split's index
    image_ids: Tensor  #: (B,) int64
    random_keys: Tensor  #: (B,) int64, each sample's `random_key`: criteria draw from it, never from a global generator
    real: Tensor  #: (B,) bool, False for repeats that only keep ranks in step during evaluation
    targets: Mapping[str, Any] = field(default_factory=dict)  #: task -> Targets of that task
    views: tuple[View, ...] | None = None  #: of each image, with a feature cache; those with features lack pixels
    #: (B, 2) int64, height and width of each image with the padding of its transform, but not the batch's; stays on the
    #: host. None: all are as large as the batch.
    frames: Tensor | None = None
    padded: bool = True  #: some image does not fill the batch
    progress: float = 0.0  #: share of the training that was done before

    def pin_memory(self) -> Batch:
        """The batch with its pixels where a GPU can fetch them by itself; torch's DataLoader calls it."""
        return replace(self, images=self.images.pin_memory())

    def to(self, device: torch.device) -> Batch:
        """The batch with all that a model needs on `device`; the host does not wait (`ops.to_device`)."""
        images, sizes = to_device(self.images, device), to_device(self.sizes, device)
        targets = {}
        for task, target in self.targets.items():
            names = [one.name for one in fields(target) if one.name not in target.host]
            targets[task] = replace(target, **{name: to_device(getattr(target, name), device) for name in names})
        views = None if self.views is None else tuple(view.to(device) for view in self.views)
        return replace(self, images=images, sizes=sizes, targets=targets, views=views)


@dataclass(frozen=True)
class Map:
    """Features of a batch behind one block of the backbone."""

    features: Tensor  #: (B, D, h, w), at least float32
    valid: Tensor  #: (B, h, w) bool, True in cells that show image; at least one of each
    prefix: Tensor | None = None  #: (B, P, D) tokens that a plain ViT has in front of its patches


def valid_region(sizes: Tensor, image_size: tuple[int, ...], grid: tuple[int, ...]) -> Tensor:
    """Mask of the grid cells over a padded image that show image: nearest-neighbour sampling of the pixel mask.

    Args:
        sizes: (B, 2) int64, height and width of the valid part in pixels.
        image_size: (H, W) of the padded batch.
        grid: (h, w) of the wanted mask.

    Returns:
        (B, h, w) bool, True = image.
    """
    axes = []
    for axis in (0, 1):
        # The same arithmetic as F.interpolate(mode="nearest"), which DETR's code applies to the padding mask.
        cells = torch.arange(grid[axis], device=sizes.device) * image_size[axis] // grid[axis]
        axes.append(cells[None, :] < sizes[:, axis, None])
    return axes[0][:, :, None] & axes[1][:, None, :]
