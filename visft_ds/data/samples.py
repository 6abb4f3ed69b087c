"""Data structures between shard and head: a sample, then a batch of samples.

Shape letters: B images, H W pixels, N objects of all images, concatenated, D width, h w grid, P tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from visft_ds.data.features import View
from visft_ds.ops import to_device
from visft_ds.settings.tiles import Window

Arrays = Mapping[str, npt.NDArray[Any]]  #: by name


@dataclass(frozen=True)
class RawSample:
    """Record of a shard after decoding, before any transform.

    `image` is None where a process reads labels only (the last pipeline stage); every transform must then
    give the same targets as with pixels, which is why the image size comes from the index.
    """

    index: int  #: position in the split's index, or number of a tile; identifies the sample everywhere
    image_id: int  #: the COCO image id, or `index` of a tile
    size: tuple[int, int]  #: (height, width) in whose pixels the annotations are
    #: (H, W, 3) uint8, RGB; or (H, W, n) float32, levels of bands from 0 to 255
    image: npt.NDArray[Any] | None
    #: COCO's objects as a shard stores them: id, bbox, category_id, iscrowd, area, perhaps segmentation
    annotations: Sequence[Mapping[str, Any]]
    captions: Sequence[str]
    window: Window | None = None  #: a tile: the part of the picture that the sample is; None: all of it
    depth: Mapping[str, Any] | None = None  #: depth map, see `data/depth.py`; None: it has none
    panoptic: Mapping[str, Any] | None = None  #: panoptic map, see `data/panoptic.py`; None: it has none


@dataclass(frozen=True)
class Sample:
    """Transformed sample. `targets` maps a task to that task's per-image labels (a mapping of arrays)."""

    index: int
    image_id: int
    original_size: tuple[int, int]  #: (height, width) of the picture, or of its tile, before any transform
    size: tuple[int, int]  #: (height, width) after the transforms
    image: Tensor | None  #: (3, H, W) uint8, or (n, H, W) float32 of bands
    random_key: int  #: key of this sample's counter-based random numbers in this step; 0 in evaluation
    targets: Mapping[str, Arrays]
    view: View | None = None  #: with a feature cache; where it has features, `image` is None
    #: (height, width) of `image` with padding of its own; None: it has none
    frame: tuple[int, int] | None = None


@dataclass(frozen=True)
class Targets:
    """Labels of a task for a batch: a dataclass of tensors over all objects, and the number of each image."""

    #: Fields that only the host uses: it must not wait for a copy to come back.
    host: ClassVar[tuple[str, ...]] = ()
    #: Arguments of the head besides the maps in training -> the fields that it gets; most heads need none.
    head_inputs: ClassVar[Mapping[str, str]] = {}


@dataclass(frozen=True)
class Batch:
    """Micro-batch. `targets` has an entry for every task that learns from these images.

    A model needs images, targets and views on its device; all else stays on the host.
    """

    #: (B, 3, H, W) uint8, or (B, n, H, W) float32 of bands, padded right and bottom; (B, 3, 0, 0) where no
    #: pixels are read
    images: Tensor
    sizes: Tensor  #: (B, 2) int64, height and width of the valid part of each image
    original_sizes: Tensor  #: (B, 2) int64, height and width as stored, or of the tile
    indices: Tensor  #: (B,) int64, positions in the split's index, or numbers of tiles
    image_ids: Tensor  #: (B,) int64
    #: (B,) int64, each sample's `random_key`: criteria draw from it, never from a global generator
    random_keys: Tensor
    real: Tensor  #: (B,) bool, False for repeats that only keep ranks in step during evaluation
    targets: Mapping[str, Any] = field(default_factory=dict)  #: task -> Targets of that task
    #: of each image, with a feature cache; those with features lack pixels
    views: tuple[View, ...] | None = None
    #: (B, 2) int64, height and width of each image with the padding of its transform, but not the batch's;
    #: stays on the host. None: all are as large as the batch.
    frames: Tensor | None = None
    mixed: bool = True  #: images of this stream can differ in size; the same on every rank, whatever it drew
    progress: float = 0.0  #: share of the training that was done before

    def pin_memory(self) -> Batch:
        """The batch with its pixels where a GPU can fetch them by itself; torch's DataLoader calls it."""
        return replace(self, images=self.images.pin_memory())

    def to(self, device: torch.device) -> Batch:
        """The batch with all that a model needs on `device`; the host does not wait (`ops.to_device`)."""
        targets = {}
        for task, target in self.targets.items():
            names = {field.name for field in fields(target)}.difference(target.host)
            moved = {name: to_device(getattr(target, name), device) for name in names}
            targets[task] = replace(target, **moved)
        views = None if self.views is None else tuple(view.to(device) for view in self.views)
        return replace(self, images=to_device(self.images, device), targets=targets, views=views)

    def real_images(self) -> list[int]:
        """Positions of those that are no repeats."""
        positions: list[int] = self.real.nonzero().flatten().tolist()
        return positions

    def of_images(self, positions: Tensor) -> Batch:
        """Some of its images, which may repeat, by their positions (N,) int64 in it; without labels."""
        names = ("images", "sizes", "original_sizes", "indices", "image_ids", "random_keys", "real")
        chosen = {name: getattr(self, name)[positions] for name in names}
        frames = None if self.frames is None else self.frames[positions]
        return replace(self, **chosen, frames=frames, targets={}, views=None)


@dataclass(frozen=True)
class Map:
    """Features of a batch behind one block of the backbone."""

    features: Tensor  #: (B, D, h, w), at least float32
    valid: Tensor  #: (B, h, w) bool, True in cells that show image; at least one of each
    #: (B, 2) float64 on the host, height and width of each image in cells, of which it may fill the last in
    #: part
    cells: Tensor
    prefix: Tensor | None = None  #: (B, P, D) tokens that a plain ViT has in front of its patches

    @classmethod
    def of(cls, features: Tensor, sizes: Tensor, frame: Sequence[int], prefix: Tensor | None = None) -> Map:
        """The map of a padded batch of `frame` pixels, of which each image has the first `sizes` (B, 2).

        A cell stands for as many pixels in every image, whether the backbone saw the padding or not.
        """
        height, width = frame
        grid = features.shape[-2:]
        valid = valid_region(sizes, (height, width), grid)
        # The product is exact, so that an image that ends with a cell has a whole number of them.
        cells = sizes.double() * torch.tensor(grid) / torch.tensor([height, width])
        return cls(features, to_device(valid, features.device), cells, prefix)

    def shares(self) -> Tensor:
        """(B, 2) float32 on the host, height and width of each image as a share of (h, w)."""
        grid = torch.tensor(self.valid.shape[1:])
        return (self.cells / grid).float()

    def has_empty_cells(self) -> bool:
        """True if some cell shows no image."""
        grid = torch.tensor(self.valid.shape[1:])
        return bool((self.cells.ceil() < grid).any())

    def parts(self) -> list[tuple[int, int]]:
        """Rows and columns of cells that show each image; one pair if they are alike."""
        pairs = [(int(rows), int(columns)) for rows, columns in self.cells.ceil().tolist()]
        return pairs[:1] if len(set(pairs)) == 1 else pairs

    def resized(self, grid: Sequence[int], *, antialias: bool = False) -> Tensor:
        """Features (B, D, *grid), interpolated bilinearly within each image: empty cells have no weight.

        As `F.interpolate` of each image's own part: at its border the last cells count alone.
        """

        def interpolated(values: Tensor) -> Tensor:
            return F.interpolate(values, tuple(grid), mode="bilinear", antialias=antialias)

        inside = self.valid[:, None].to(self.features.dtype)
        weights = interpolated(inside)
        return interpolated(self.features * inside) / weights.clamp(min=1e-6)


def valid_region(sizes: Tensor, image_size: tuple[int, ...], grid: tuple[int, ...]) -> Tensor:
    """Mask of the grid cells over a padded image that show image: nearest-neighbour sampling of the pixel
    mask.

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
