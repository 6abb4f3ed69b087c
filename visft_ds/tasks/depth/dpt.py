"""DPT head (Ranftl et al., arXiv 2103.13413): maps at several sizes, fused from the coarsest to the finest.

As in Depth Anything: each result is brought to the exact size of the next map, and at the end to the pixels.
Images of a batch that differ in size go through one by one: what interpolation and convolutions make of an
image depends on no padding.
Letters: B images, K maps, E width of the fusion, h w grid.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visft_ds.data.samples import Map
from visft_ds.ops import at_least_float32
from visft_ds.tasks import Shapes
from visft_ds.tasks.channels import Channels
from visft_ds.tasks.depth.config import DptHeadConfig
from visft_ds.tasks.depth.head import DepthOutput

_LAST = 32  # channels of the last convolution
_WIDEST = 4  # times the width of the fusion, of the coarse maps (DPT-Large)


class DptDepth(nn.Module):
    """Metres of each pixel, from all maps of the backbone; four are published.

    Maps of one grid (those of a plain ViT) are brought to four times, twice, once and half its size; maps of
    several grids stay as they are.
    """

    def __init__(self, shapes: Shapes, options: DptHeadConfig) -> None:
        """A head for maps of these (width, pixels to a cell)."""
        super().__init__()
        self.options = options
        width = options.hidden_dim
        strides = [stride for _, stride in shapes]
        self.stride = strides[0]
        self.levels = nn.ModuleList()
        self.fusions = nn.ModuleList()
        for number, (map_width, _) in enumerate(shapes):
            factor = 1.0
            if len(set(strides)) == 1:
                factor = 2.0 ** (len(shapes) - 2 - number)
            channels = width * min(2**number, _WIDEST)
            self.levels.append(Level(map_width, channels, width, factor))
            # In the order of the forward: the coarsest map is the first.
            self.fusions.append(Fusion(width, merges=number > 0))
        self.conv1 = nn.Conv2d(width, width // 2, 3, padding=1)
        self.conv2 = nn.Conv2d(width // 2, _LAST, 3, padding=1)
        self.conv3 = nn.Conv2d(_LAST, 1, 1)

    def forward(self, maps: Sequence[Map]) -> DepthOutput:
        """Metres of each pixel of the frame; those beyond an image mean nothing."""
        first = maps[0].features
        frame = [cells * self.stride for cells in first.shape[2:]]
        extents = maps[-1].shares()
        parts = [level.parts() for level in maps]
        if all(len(of_map) == 1 for of_map in parts):
            metres = self._of_part([level.features for level in maps], [of_map[0] for of_map in parts])
            return DepthOutput(_padded(metres, frame), extents, relative=self.options.relative)
        every = []
        for image in range(len(first)):
            features = [level.features[image : image + 1] for level in maps]
            part = [of_map[image if len(of_map) > 1 else 0] for of_map in parts]
            every.append(_padded(self._of_part(features, part), frame))
        return DepthOutput(torch.cat(every), extents, relative=self.options.relative)

    def _of_part(self, features: Sequence[Tensor], part: Sequence[tuple[int, int]]) -> Tensor:
        """Metres (B, H, W) of images that fill the first rows and columns (`part`) of each of the maps."""
        levels = []
        for level, map_, (rows, columns) in zip(self.levels, features, part, strict=True):
            levels.append(level(map_[..., :rows, :columns]))
        sizes = [[2 * side for side in levels[0].shape[2:]], *(level.shape[2:] for level in levels)]
        fused = None
        for fusion, level, size in zip(self.fusions, levels[::-1], sizes[-2::-1], strict=True):
            fused = fusion(level, fused, size)
        pixels = [cells * self.stride for cells in part[0]]
        fine = _enlarged(self.conv1(fused), pixels)
        hidden = F.relu(self.conv2(fine))
        depth = at_least_float32(self.conv3(hidden))[:, 0].sigmoid() * self.options.farthest
        return depth.clamp(min=self.options.nearest)


def _enlarged(values: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(values, tuple(size), mode="bilinear", align_corners=True)


def _padded(metres: Tensor, frame: Sequence[int]) -> Tensor:
    """Metres (B, H, W) in the upper left of a frame."""
    below = frame[0] - metres.shape[1]
    right = frame[1] - metres.shape[2]
    return F.pad(metres, (0, right, 0, below), value=1.0)


class Level(nn.Module):
    """A map's way into the head: its channels' means and spreads away, then projected and resized."""

    def __init__(self, width: int, channels: int, into: int, factor: float) -> None:
        super().__init__()
        self.channels = Channels(width)
        self.projection = nn.Conv2d(width, channels, 1)
        self.resize: nn.Module = nn.Identity()
        if factor > 1:
            self.resize = nn.ConvTranspose2d(channels, channels, int(factor), stride=int(factor))
        elif factor < 1:
            self.resize = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.out = nn.Conv2d(channels, into, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, h, w) -> (B, E, factor * h, factor * w)."""
        normed = self.channels(x.movedim(1, -1)).movedim(-1, 1)
        out: Tensor = self.out(self.resize(self.projection(normed)))
        return out


class Fusion(nn.Module):
    """A map and the result of the coarser ones, fused and enlarged; the coarsest map has none."""

    def __init__(self, width: int, *, merges: bool) -> None:
        super().__init__()
        self.skip = Residual(width) if merges else None
        self.residual = Residual(width)
        self.projection = nn.Conv2d(width, width, 1)

    def forward(self, level: Tensor, coarser: Tensor | None, size: Sequence[int]) -> Tensor:
        """level and coarser (B, E, h, w) -> (B, E, *size)."""
        x = level
        if self.skip is not None:
            assert coarser is not None
            x = coarser + self.skip(level)
        out: Tensor = self.projection(_enlarged(self.residual(x), size))
        return out


class Residual(nn.Module):
    """Two convolutions behind activations, added to their input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.relu(x))
        out: Tensor = x + self.conv2(F.relu(hidden))
        return out
