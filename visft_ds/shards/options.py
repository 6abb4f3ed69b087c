"""Files and settings of a build of shards, checked."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path

from visft_ds.data.depth import RELATIVE
from visft_ds.shards.bands import Form, Range
from visft_ds.shards.common import Exif, FolderSplit, Json, is_split_name
from visft_ds.tasks.vocabulary import TOKENIZER

_ADDRESS = re.compile("[A-Za-z][A-Za-z0-9+.-]+:/(?!/)")  # pathlib makes one slash of two


def state_folder(out: Path, split: str) -> Path:
    """Folder for the state of a build of a split."""
    return out / f".{split}.build"


@dataclass(frozen=True, kw_only=True)
class Options(FolderSplit):
    """Inputs and settings of a build."""

    out: Path
    ids: Path | None = None  #: file of image ids or names, one a line: only these
    max_size: int = 256_000_000  #: bytes of a shard
    limit: int | None = None  #: only the first so many images of the order
    seed: int = 0  #: of the order
    exif: Exif = None
    masks_from_boxes: bool = False  #: an object without a mask gets the ellipse in its box
    range: Range | None = None  #: values of black and white in pictures of bands; None: found in the pictures
    bands: tuple[int, ...] | None = None  #: numbers of the bands that are read, from 1; None: all
    form: Form | None = None  #: of pictures of bands, which the build finds; None: three colours of 8 bits

    def __post_init__(self) -> None:
        if _ADDRESS.match(str(self.out)):
            address = str(self.out).replace(":/", "://", 1)
            remedy = "shards are built in a local folder; copy its files to the address afterwards"
            raise ValueError(f"--out {address}: {remedy}")
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"--out {self.out} is a file: name a folder")
        if not is_split_name(self.name):
            raise ValueError(f"split name {self.name!r}: only letters, digits, '-' and '_' are allowed")
        if not 0 <= self.seed < 1 << 63:
            raise ValueError(f"seed {self.seed}: it must not be negative, and below 2**63")
        labels = (self.instances, self.maps, self.captions, self.depth, self.panoptic)
        if all(kind is None for kind in labels):
            raise ValueError("there are no labels: give --instances, --captions or both")
        if not self.images.is_dir():
            remedy = "give --images DIR, or export the data set with its images"
            raise ValueError(f"there is no folder of images {self.images}: {remedy}")

    def content(self) -> Json:
        """Settings that determine the bytes beside the files, for the manifest."""
        content: Json = {
            "max_size": self.max_size,
            "limit": self.limit,
            "seed": self.seed,
            "exif": self.exif,
            "masks_from_boxes": self.masks_from_boxes,
            "tokenizer": TOKENIZER,
        }
        if self.division is not None:  # its seed is the one above
            content["val"] = self.division.share
            content["group"] = self.division.group
        if self.depth is not None:
            content["depth"] = RELATIVE if self.depth.metres is None else self.depth.metres
        if self.form is not None:
            content["bands"] = asdict(self.form)
        return content

    @property
    def state(self) -> Path:
        """Folder for the state of a build."""
        return state_folder(self.out, self.name)
