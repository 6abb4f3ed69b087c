"""Depth maps of a data set: `depth/SPLIT/NAME.png` of images called NAME, alone or beside other labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import numpy as np

from visft_ds.data.depth import read_numbers, stored_depth
from visft_ds.files import read_bytes
from visft_ds.shards.common import Json

if TYPE_CHECKING:
    from visft_ds.shards.coco import SourceImage

FOLDER = "depth"
_NEARLY_ALL = 0.999  # of the pixels: some sensors give single ones of any depth


@dataclass(frozen=True)
class DepthMaps:
    """Depth maps of a split."""

    files: Mapping[str, Path]  #: name of an image without suffix -> its map
    metres: float | None  #: of a number in them; None: they are relative
    listing: Json | None = None  #: the images, as COCO lists them, where no other label does

    def file_of(self, image: str) -> Path | None:
        """The map of an image of this file name."""
        return self.files.get(str(PurePath(image).with_suffix("")))


def check_size(kind: str, shape: tuple[int, ...], image: SourceImage) -> None:
    """Raise ValueError for a map of another size than its image."""
    height, width = shape
    if (height, width) != (image.height, image.width):
        raise ValueError(
            f"{kind} map of another size: {width} x {height}, the image has {image.width} x {image.height}"
        )


def depth_of(image: SourceImage, maps: DepthMaps) -> tuple[dict[str, Any], float]:
    """The depth map of an image as a label has it, and its `Manifest.farthest`, 0 of a relative map.

    Raises ValueError for a map that is none, of another size, or without a depth.
    """
    data = read_bytes(image.maps["depth"].path)
    numbers = read_numbers(data)
    if not numbers.any():
        raise ValueError("depth map without a depth, all of it is 0")
    check_size("depth", numbers.shape, image)
    farthest = 0.0
    if maps.metres is not None:
        farthest = maps.metres * float(np.quantile(numbers[numbers > 0], _NEARLY_ALL))
    return stored_depth(data, maps.metres), farthest
