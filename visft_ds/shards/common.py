"""Shared by the layouts of data sets: names of splits, images as COCO lists them, problems of the data."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import orjson

from visft_ds.files import image_frame, read_bytes, shown_name

if TYPE_CHECKING:
    from visft_ds.shards.depth import DepthMaps
    from visft_ds.shards.division import Division
    from visft_ds.shards.panoptic import PanopticMaps

Json = dict[str, Any]  # an object of a JSON file
Corners = tuple[float, float, float, float]  # left, top, right, bottom in pixels
#: A COCO file, or its content where it was made of another format.
CocoFile = Path | Mapping[str, Any]
#: Whether pictures are turned as their EXIF data says; None: unless only the stored size fits the
#: annotations.
Exif = Literal["apply", "ignore"] | None
#: Name of a split in a data set -> its name among the shards.
SPLITS: Mapping[str, str] = {
    "train": "train",
    "training": "train",
    "default": "train",  # CVAT's name of the only one
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
#: An absolute path, or one with backslashes.
_ELSEWHERE = re.compile(r"[A-Za-z]:|/|.*\\", re.DOTALL)
CLASSES = "classes.txt"  #: a list of names, one a line
IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"))
BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # which Windows puts before a text
_EXAMPLES = 3
_AROUND = 64  # bytes of JSON around a second picture


class Findings(dict[str, tuple[int, list[str]]]):
    """Problems of the data: kind -> (how often, the first few examples)."""

    def add(self, kind: str, example: object) -> None:
        count, examples = self.get(kind, (0, []))
        if count < _EXAMPLES:
            examples = [*examples, shown_name(f"{example!s:.120}")]
        self[kind] = (count + 1, examples)

    def merge(self, others: Findings) -> None:
        """Add those of another part of the data."""
        for kind, (count, examples) in others.items():
            before, earlier = self.get(kind, (0, []))
            self[kind] = (before + count, [*earlier, *examples][:_EXAMPLES])

    def refuse_above_a_tenth(self, of: int, where: object, what: str) -> None:
        """Raise ValueError if there are more than a tenth of all."""
        total = sum(count for count, _ in self.values())
        if total > of / 10:
            heading = f"{where}: {total} of its {of} {what} cannot be used:"
            raise ValueError("\n".join([heading, *lines_of(self)]))


def lines_of(findings: Mapping[str, Sequence[Any]]) -> list[str]:
    """Findings for a person."""
    return [f"{count:>7} x {kind}, e.g. {', '.join(shown)}" for kind, (count, shown) in findings.items()]


@dataclass(frozen=True, slots=True)
class SecondPicture:
    """File of a map of an image, which goes into its label."""

    path: Path
    bytes: int
    modified: int  #: time of its file, nanoseconds

    @classmethod
    def at(cls, path: Path) -> SecondPicture:
        """The file at a path. Raises OSError without it."""
        status = path.stat()
        return cls(path, status.st_size, status.st_mtime_ns)

    def label_bytes(self) -> int:
        """Most bytes that it adds to a label."""
        return _AROUND + -(-self.bytes // 3) * 4


@dataclass(frozen=True)
class Corrections:
    """Changes of labels, see `shards/corrections.py`."""

    path: Path
    source: Json  #: as `source_of` says
    content: Json


@dataclass(frozen=True)
class FolderSplit:
    """Inputs of a build that a folder has for a split."""

    name: str
    images: Path
    instances: CocoFile | None = None
    captions: CocoFile | None = None
    maps: CocoFile | None = None  #: label maps, as instances of which no two of an image overlap
    findings: Findings = field(default_factory=Findings)  #: about the layout
    division: Division | None = None  #: only its validation, of `val`, or the others
    corrections: Corrections | None = None  #: of its labels
    depth: DepthMaps | None = None  #: of its images
    panoptic: PanopticMaps | None = None  #: of its images


def json_of(data: bytes) -> Any:
    """The value in a JSON file."""
    return orjson.loads(data.removeprefix(BYTE_ORDER_MARK))


def read_lines(path: Path) -> list[str]:
    """The lines of a text, without empty ones at its end."""
    return read_bytes(path).decode("utf-8-sig").rstrip().splitlines()


def source_of(name: str, data: bytes) -> Json:
    """What a manifest says of a file that a split was made of."""
    return {"name": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def split_of(name: str) -> str:
    """Name among the shards of a split that a data set calls `name`: the same if it is no usual one."""
    return SPLITS.get(name.lower(), name)


def is_split_name(name: str) -> bool:
    """Return True for a name of letters, digits, "-" and "_"."""
    return bool(name) and all(sign.isalnum() or sign in "-_" for sign in name)


def name_here(folder: Path, name: str) -> str | None:
    """The name in `folder` of what a tool on another machine called by an absolute path, or by one with
    backslashes: the longest end of the path that is there. None for another name, and if nothing is there.
    """
    if not _ELSEWHERE.match(name) or not name.isprintable():
        return None
    parts = name.replace("\\", "/").split("/")
    if ".." in parts:
        parts = parts[len(parts) - parts[::-1].index("..") :]
    for first in range(len(parts)):
        end = "/".join(parts[first:]).lstrip("/")
        if end and (folder / end).exists():
            return end
    return None


def listed_image(folder: Path, name: str, number: int, exif: Exif) -> Json:
    """An image as COCO lists it; one that cannot be read, which a build leaves out, is of 1 x 1 pixels."""
    try:
        frame = image_frame(folder / name)
    except (ValueError, OSError):
        height = 1
        width = 1
    else:
        height, width = (frame.height, frame.width) if exif == "ignore" else frame.upright
    return {"id": number, "file_name": name, "height": height, "width": width}


def box_object(left: float, top: float, width: float, height: float) -> Json:
    """Box and area of an object as COCO has them, in pixels."""
    box = [left, top, round(width, 3), round(height, 3)]
    return {"bbox": box, "area": round(width * height, 3)}


def extent_of(polygons: Sequence[Sequence[float]]) -> Corners:
    """The corners of the box around polygons `[x, y, x, y, ...]`."""
    xs = [x for polygon in polygons for x in polygon[::2]]
    ys = [y for polygon in polygons for y in polygon[1::2]]
    return min(xs), min(ys), max(xs), max(ys)


def polygon_object(polygons: list[list[float]]) -> Json:
    """Box, area and segmentation of an object of polygons `[x, y, x, y, ...]`, in pixels."""
    area = 0.0
    for polygon in polygons:
        xs = polygon[::2]
        ys = polygon[1::2]
        doubled = 0.0  # by the shoelace formula
        for corner, x in enumerate(xs):
            following = (corner + 1) % len(xs)
            doubled += x * ys[following] - xs[following] * ys[corner]
        area += abs(doubled) / 2
    left, top, right, bottom = extent_of(polygons)
    content = box_object(left, top, right - left, bottom - top)
    content["area"] = round(area, 3)
    content["segmentation"] = polygons
    return content
