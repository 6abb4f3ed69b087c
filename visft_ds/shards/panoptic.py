"""Panoptic maps of a data set: a JSON file of COCO's form, and PNG files in the folder of its name.

| | JSON file | images |
|---|---|---|
| COCO | `panoptic_SPLIT.json`, in the folder or in `annotations/` | as `instances_SPLIT.json` has them |
| Cityscapes, by its `createPanopticImgs.py` | `gtFine/cityscapes_panoptic_SPLIT.json` | `leftImg8bit/SPLIT` |
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from visft_ds.data.panoptic import problem_of_segment, read_segment_numbers, stored_panoptic
from visft_ds.data.shards import PanopticCategory
from visft_ds.files import checked_name, read_bytes, reading
from visft_ds.shards.common import Json, json_of, source_of
from visft_ds.shards.depth import check_size

if TYPE_CHECKING:
    from visft_ds.shards.coco import SourceImage

_PHOTO = "_leftImg8bit"  # ends the names of Cityscapes' images
_FINE = "_gtFine"  # stands before it in Cityscapes' JSON file


class PanopticMap(NamedTuple):
    """The map of an image."""

    file: Path
    segments: tuple[Mapping[str, int], ...]  #: id, category_id and iscrowd of each


@dataclass(frozen=True)
class PanopticMaps:
    """Panoptic maps of a split."""

    maps: Mapping[str, PanopticMap]  #: `_key` of an image -> its map
    categories: tuple[PanopticCategory, ...]
    file: Mapping[str, Any]  #: name, bytes and sha256 of the JSON file
    listing: Json | None  #: the images, as COCO lists them, where no other label does

    def map_of(self, image: str) -> PanopticMap | None:
        """The map of an image of this file name."""
        return self.maps.get(_key(image))


def read_panoptic(path: Path, images: Path | None = None) -> PanopticMaps:
    """Read a panoptic file of COCO, or of Cityscapes; `images` is their folder if no other label lists them.

    Raises ValueError for another file, and without the folder of its PNG files.
    """
    folder = path.with_suffix("")
    data = read_bytes(path)
    with reading(path, "a panoptic file of COCO"):
        content = json_of(data)
        categories = _categories(content["categories"])
        if not folder.is_dir():
            raise ValueError(f"its PNG files are missing: they belong in the folder {folder}")
        ids = {category.coco_id for category in categories}
        names = {image["id"]: str(image["file_name"]) for image in content["images"]}
        maps = dict[str, PanopticMap]()
        for annotation in content["annotations"]:
            name = checked_name(annotation["file_name"], "a map")
            segments = tuple(_segment(segment, name, ids) for segment in annotation["segments_info"])
            if annotation["image_id"] not in names:
                raise ValueError(f"image_id {annotation['image_id']!r:.40} of {name} is not among its images")
            maps[_key(names[annotation["image_id"]])] = PanopticMap(folder / name, segments)
        listing: Json | None = None
        if images is not None:
            listed = _listed(content["images"], images)
            listing = {"images": listed, "annotations": [], "categories": []}
    return PanopticMaps(maps, categories, source_of(path.name, data), listing)


def _key(name: str) -> str:
    """Name of an image by which its map is found; Cityscapes' JSON file calls images otherwise."""
    path = PurePath(name)
    if path.stem.endswith(_PHOTO):
        return path.stem.removesuffix(_PHOTO).removesuffix(_FINE)
    return str(path.with_suffix(""))


def _categories(entries: Sequence[Mapping[str, Any]]) -> tuple[PanopticCategory, ...]:
    categories = []
    for position, entry in enumerate(sorted(entries, key=lambda entry: int(entry["id"]))):
        name = str(entry["name"])
        categories.append(PanopticCategory(position, int(entry["id"]), name, bool(entry["isthing"])))
    if len({category.coco_id for category in categories}) < len(categories) or not categories:
        raise ValueError("it must have categories, no two of one id")
    return tuple(categories)


def _segment(segment: Mapping[str, Any], name: str, categories: Collection[int]) -> dict[str, int]:
    problem = problem_of_segment(segment, categories)
    if problem is not None:
        raise ValueError(f"{name}: {problem}")
    return {key: segment[key] for key in ("id", "category_id", "iscrowd")}


def _listed(entries: Sequence[Mapping[str, Any]], images: Path) -> list[Json]:
    """The images with numbers as ids, and the names of their files."""
    files = dict[str, str]()
    if entries and not (images / str(entries[0]["file_name"])).is_file():
        for path in images.rglob(f"*{_PHOTO}.*"):
            files[_key(path.name)] = str(path.relative_to(images))
    listed = []
    for number, entry in enumerate(entries, 1):
        name = str(entry["file_name"])
        id_ = entry["id"] if isinstance(entry["id"], int) else number
        listed.append({**entry, "id": id_, "file_name": files.get(_key(name), name)})
    return listed


def panoptic_of(image: SourceImage) -> dict[str, Any]:
    """The panoptic map of an image as a label has it.

    Raises ValueError for a map that is none, of another size, or with a segment that is not listed.
    """
    data = read_bytes(image.maps["panoptic"].path)
    numbers = read_segment_numbers(data)
    check_size("panoptic", numbers.shape, image)
    listed = {segment["id"] for segment in image.segments}
    unlisted = sorted(set(np.unique(numbers).tolist()) - listed - {0})
    if unlisted:
        raise ValueError(f"panoptic map with segment {unlisted[0]}, which its JSON file does not list")
    return stored_panoptic(data, image.segments)
