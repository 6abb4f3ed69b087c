"""COCO JSON files -> checked records, one per image, with a list of everything that was odd.

What can be kept is kept as given: crowds and boxes without area belong to the data set, training leaves them out.
What no reader could use (unknown category, no image, malformed box) is dropped and counted.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from visft_ds.data.manifest import Category

#: Everything that is looked for -> what is done about it.
FINDINGS: Mapping[str, str] = {
    "image entry malformed": "left out",
    "image id twice": "the first entry kept",
    "annotation malformed": "dropped: its id or category id is no integer",
    "annotation without image": "dropped",
    "annotation id twice": "the first kept",
    "unknown category": "annotation dropped",
    "box malformed": "annotation dropped",
    "box without area": "kept in the shard, left out in training",
    "box beyond the image": "kept as given, cut at the border in training",
    "area missing": "width x height of the box used",
    "polygon under three points": "kept as given, of no use as a mask",
    "instance without mask": "kept",
    "crowd": "kept in the shard, left out in training, used in evaluation",
    "crowd dropped": "dropped, as --crowd drop asks",
    "caption without image": "dropped",
    "caption empty": "dropped",
    "image without instances": "kept",
    "image without captions": "kept",
    "EXIF rotation": "ignored: the annotations fit the pixels as stored",
    "grey image": "kept, decoded as RGB",
    "CMYK image": "kept, decoded as RGB",
    "PNG named otherwise": "kept, stored as .png",
    "quarantined": "left out, see the list with reasons",
}
_EXAMPLES = 3
#: COCO's boxes pass the border by rounding; only more than this many pixels is worth a word.
_BORDER = 1.0


class Findings:
    """Counts of what was found, with the first few examples of each kind."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._examples: dict[str, list[str]] = {}

    def add(self, kind: str, example: str) -> None:
        assert kind in FINDINGS, kind
        self._counts[kind] = self._counts.get(kind, 0) + 1
        examples = self._examples.setdefault(kind, [])
        if len(examples) < _EXAMPLES:
            examples.append(example)

    def extend(self, found: Iterable[Sequence[str]]) -> None:
        """Add (kind, example) pairs."""
        for kind, example in found:
            self.add(kind, example)

    def listed(self) -> list[dict[str, Any]]:
        """One entry per kind in a fixed order: kind, count, examples, action."""
        return [
            {"kind": kind, "count": self._counts[kind], "examples": self._examples[kind], "action": action}
            for kind, action in FINDINGS.items()
            if kind in self._counts
        ]


@dataclass(frozen=True)
class SourceImage:
    """One image of a COCO data set with all that belongs to it."""

    image_id: int
    file_name: str
    width: int
    height: int
    license: Any
    annotations: list[dict[str, Any]] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)

    def label(self) -> bytes:
        """The JSON file of this sample in a shard."""
        fields: dict[str, Any] = {
            "image_id": self.image_id,
            "file_name": self.file_name,
            "width": self.width,
            "height": self.height,
        }
        if self.license is not None:
            fields["license"] = self.license
        return orjson.dumps({**fields, "annotations": self.annotations, "captions": self.captions})

    def trainable(self) -> int:
        """How many annotations are neither crowd nor without area inside the image."""
        return sum(not one["iscrowd"] and self.has_area(one["bbox"]) for one in self.annotations)

    def has_area(self, bbox: Sequence[float]) -> bool:
        """Whether something of a box (x, y, width, height) lies inside the image."""
        x, y, width, height = bbox
        return min(x + width, self.width) > max(x, 0) and min(y + height, self.height) > max(y, 0)


@dataclass(frozen=True)
class Source:
    """A COCO data set, images by ascending id."""

    images: list[SourceImage]
    categories: tuple[Category, ...]
    findings: Findings
    files: Mapping[str, Mapping[str, Any]]  #: role -> name, bytes, sha256 of each JSON file


def read_source(instances: Path, captions: Path | None, *, keep_crowd: bool = True) -> Source:
    """Read and check COCO JSON files.

    Raises:
        ValueError: a file is missing, is no JSON or lacks the parts of a COCO file; names the file and the reason.
    """
    findings = Findings()
    content, entry = _load(instances, ("images", "annotations", "categories"))
    files = {"instances": entry}
    categories = _categories(content["categories"], instances)
    images = _images(content["images"], findings)
    _add_annotations(content["annotations"], images, {c.coco_id for c in categories}, keep_crowd, findings)
    if captions is not None:
        content, files["captions"] = _load(captions, ("annotations",))
        _add_captions(content["annotations"], images, findings)
    ordered = [images[image_id] for image_id in sorted(images)]
    for image in ordered:
        if not image.annotations:
            findings.add("image without instances", f"image {image.image_id}")
        if captions is not None and not image.captions:
            findings.add("image without captions", f"image {image.image_id}")
    return Source(ordered, categories, findings, files)


def _load(path: Path, needed: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    try:
        content = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    missing = [part for part in needed if not isinstance(content, dict) or not isinstance(content.get(part), list)]
    if missing:
        raise ValueError(f"{path} is no COCO file of this kind: it has no list {', '.join(map(repr, missing))}")
    if not all(isinstance(entry, dict) for part in needed for entry in content[part]):
        raise ValueError(f"{path} is no COCO file: every entry of {', '.join(needed)} must be an object")
    return content, {"name": path.name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _categories(entries: Sequence[Mapping[str, Any]], path: Path) -> tuple[Category, ...]:
    names: dict[int, str] = {}
    for entry in entries:
        if not _is_int(entry.get("id")) or not isinstance(entry.get("name"), str):
            raise ValueError(f"{path}: category {entry!r} needs an integer 'id' and a string 'name'")
        if entry["id"] in names:
            raise ValueError(f"{path}: two categories have id {entry['id']}; category ids must be unique")
        names[entry["id"]] = entry["name"]
    return tuple(Category(place, coco_id, names[coco_id]) for place, coco_id in enumerate(sorted(names)))


def _images(entries: Sequence[Mapping[str, Any]], findings: Findings) -> dict[int, SourceImage]:
    images: dict[int, SourceImage] = {}
    for entry in entries:
        image_id, width, height, name = (entry.get(key, -1) for key in ("id", "width", "height", "file_name"))
        numbers = all(map(_is_int, (image_id, width, height))) and image_id >= 0 and width > 0 and height > 0
        if not numbers or not isinstance(name, str):
            findings.add("image entry malformed", f"{entry!r}"[:120])
        elif image_id in images:
            findings.add("image id twice", f"image {image_id} ({name})")
        else:
            images[image_id] = SourceImage(image_id, name, width, height, entry.get("license"))
    return images


def _add_annotations(
    entries: Sequence[Mapping[str, Any]],
    images: Mapping[int, SourceImage],
    categories: set[int],
    keep_crowd: bool,
    findings: Findings,
) -> None:
    seen: set[int] = set()
    for entry in entries:
        where = f"annotation {entry.get('id')} of image {entry.get('image_id')}"
        image = _get(images, entry.get("image_id"))
        if not _is_int(entry.get("id")) or not _is_int(entry.get("category_id")):
            findings.add("annotation malformed", where)
        elif image is None:
            findings.add("annotation without image", where)
        elif entry["id"] in seen:
            findings.add("annotation id twice", where)
        elif entry["category_id"] not in categories:
            findings.add("unknown category", f"{where}: category {entry['category_id']}")
        elif not _is_box(entry.get("bbox")):
            findings.add("box malformed", f"{where}: {entry.get('bbox')!r}")
        elif entry.get("iscrowd") and not keep_crowd:
            findings.add("crowd dropped", where)
        else:
            seen.add(entry["id"])
            image.annotations.append(_checked(entry, image, where, findings))


def _checked(entry: Mapping[str, Any], image: SourceImage, where: str, findings: Findings) -> dict[str, Any]:
    """The stored form of an annotation that is kept."""
    x, y, width, height = entry["bbox"]
    if not image.has_area(entry["bbox"]):
        findings.add("box without area", f"{where}: {entry['bbox']}")
    beyond = max(-x, -y, x + width - image.width, y + height - image.height)
    if beyond > _BORDER:
        findings.add("box beyond the image", f"{where}: {entry['bbox']} in {image.width} x {image.height}")
    if "area" not in entry:
        findings.add("area missing", where)
    segmentation = entry.get("segmentation")
    if entry.get("iscrowd"):
        findings.add("crowd", where)
    elif not segmentation:
        findings.add("instance without mask", where)
    if isinstance(segmentation, list) and not all(map(_is_polygon, segmentation)):
        findings.add("polygon under three points", where)
    stored = {
        "id": entry["id"],
        "bbox": entry["bbox"],
        "category_id": entry["category_id"],
        "iscrowd": int(bool(entry.get("iscrowd"))),
        "area": entry.get("area", width * height),
    }
    return stored if segmentation is None else {**stored, "segmentation": segmentation}


def _add_captions(entries: Sequence[Mapping[str, Any]], images: Mapping[int, SourceImage], findings: Findings) -> None:
    for entry in entries:
        image, caption = _get(images, entry.get("image_id")), entry.get("caption")
        where = f"caption {entry.get('id')} of image {entry.get('image_id')}"
        if image is None:
            findings.add("caption without image", where)
        elif not isinstance(caption, str) or not caption.strip():
            findings.add("caption empty", where)
        else:
            image.captions.append(caption)


def _get(images: Mapping[int, SourceImage], image_id: Any) -> SourceImage | None:
    return images.get(image_id) if _is_int(image_id) else None


def _is_int(value: Any) -> bool:
    """Whether a value is an integer that fits into 64 bits."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63


def _is_polygon(value: Any) -> bool:
    return isinstance(value, list) and len(value) >= 6 and len(value) % 2 == 0


def _is_box(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 4
        and all(isinstance(number, int | float) and math.isfinite(number) for number in value)
    )
