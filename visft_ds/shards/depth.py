"""Depth maps of a data set: `depth/SPLIT/NAME.png` of images called NAME, alone or beside other labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from visft_ds.data.depth import read_numbers, stored_depth
from visft_ds.files import read_bytes

if TYPE_CHECKING:
    from visft_ds.shards.coco import SourceImage
    from visft_ds.shards.common import Json

FOLDER = "depth"


@dataclass(frozen=True)
class DepthMaps:
    """Depth maps of a split."""

    files: Mapping[str, Path]  #: name of an image without suffix -> its map
    metres: float | None  #: of a number in them; None: they are relative
    listing: Json | None = None  #: the images, as COCO lists them, where no other label does

    def file_of(self, image: str) -> Path | None:
        """The map of an image of this file name."""
        return self.files.get(str(PurePath(image).with_suffix("")))


def depth_of(image: SourceImage, maps: DepthMaps) -> dict[str, Any]:
    """The depth map of an image as a label has it.

    Raises ValueError for a map that is none, of another size, or without a depth.
    """
    assert image.depth is not None
    data = read_bytes(image.depth.path)
    numbers = read_numbers(data)
    if not numbers.any():
        raise ValueError("depth map without a depth, all of it is 0")
    height, width = numbers.shape
    if (height, width) != (image.height, image.width):
        raise ValueError(
            f"depth map of another size: {width} x {height}, the image has {image.width} x {image.height}"
        )
    return stored_depth(data, maps.metres)
