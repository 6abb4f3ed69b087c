"""Depth maps of a data set: `depth/SPLIT/NAME.png` of images called NAME, alone or beside other labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from visft_ds.data.depth import read_numbers, stored_depth
from visft_ds.files import read_bytes

if TYPE_CHECKING:
    from visft_ds.shards.coco import SourceImage
    from visft_ds.shards.common import Json

FOLDER = "depth"
_AROUND = 64  # bytes of JSON around a map


@dataclass(frozen=True)
class DepthMaps:
    """Depth maps of a split."""

    files: Mapping[str, Path]  #: name of an image without suffix -> its map
    metres: float | None  #: of a number in them; None: they are relative
    listing: Json | None = None  #: the images, as COCO lists them, where no other label does

    def file_of(self, image: str) -> Path | None:
        """The map of an image of this file name."""
        return self.files.get(str(PurePath(image).with_suffix("")))


def label_bytes(file_bytes: int) -> int:
    """Most bytes that a map of so many adds to a label."""
    return _AROUND + -(-file_bytes // 3) * 4 if file_bytes else 0


def label_with_depth(image: SourceImage, maps: DepthMaps | None) -> bytes:
    """The label of an image, with its depth map if it has one.

    Raises ValueError for a map that is none, or of another size.
    """
    if image.depth is None or maps is None:
        return image.label()
    data = read_bytes(image.depth)
    height, width = read_numbers(data).shape
    if (height, width) != (image.height, image.width):
        raise ValueError(
            f"depth map of another size: {width} x {height}, the image has {image.width} x {image.height}"
        )
    return image.label(stored_depth(data, maps.metres))
