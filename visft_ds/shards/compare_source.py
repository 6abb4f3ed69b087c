"""Shards against the COCO JSON files they were made from: everything that was kept must be as given.

The comparison reads the JSON files itself and shares no code with the packer. What the packer may leave out is allowed
to lack: images on the quarantine list or beyond the chosen ones, annotations that no reader could use, empty captions.
"""

from __future__ import annotations

import codecs
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
from faster_coco_eval import mask as coco_mask

from visft_ds.data.labels import parse_label
from visft_ds.data.manifest import Manifest, manifest_path
from visft_ds.data.shards import ShardReader
from visft_ds.shards.problem import Problem, some

#: Options of a build that leave images out on purpose, and the values with which they do not.
_CHOOSING: Mapping[str, tuple[Any, ...]] = {
    "limit": (None,),
    "licenses": (None,),
    "keep_empty": (None, True),
    "drop_duplicates": (None, False),
}
#: Role of the file among the sources that names the chosen images.
_IDS = "ids"
#: What the option `categories` says where a file maps them, and a finding of masks that were dropped.
_MAPPED, _MALFORMED = "file", "mask malformed"
_COMPARED = ("bbox", "category_id", "iscrowd", "area", "segmentation")


@dataclass
class _Expected:
    """What the JSON files say of an image; annotations that the packer leaves out are not among them."""

    entry: Mapping[str, Any]
    annotations: dict[Any, Mapping[str, Any]] = field(default_factory=dict)
    captions: list[str] = field(default_factory=list)


def compare_source(manifest: Manifest, instances: Path | None, captions: Path | None) -> list[Problem]:
    """Read all labels of a split and compare them with the JSON files it was made from.

    Where a file renamed the categories, each category of the source must have become one of the shards throughout.

    Raises:
        ValueError: a JSON file cannot be used; names it.
    """
    mapped = manifest.options.get("categories") == _MAPPED
    known = None if mapped else {category.coco_id for category in manifest.categories}
    images = _read_source(instances, captions, known, keep_crowd=manifest.options.get("keep_crowd", True))
    malformed = any(finding["kind"] == _MALFORMED for finding in manifest.findings)
    comparison = _Comparison(instances is not None, captions is not None, mapped=mapped, malformed=malformed)
    problems = []
    chosen: set[int] = set()
    lost: list[tuple[Mapping[str, Any], str]] = []
    with ShardReader(manifest) as reader:
        for index in range(len(reader)):
            row = reader.row(index)
            chosen.add(row["image_id"])
            key, shard = f"{row['image_id']:012d}", manifest.shards[row["shard"]].name
            try:
                label = parse_label(reader.read(index, "labels")[1] or b"")
            except ValueError as error:
                problems.append(Problem(shard, f"label of {key}: {error}", (key,), row["label_offset"]))
                continue
            expected = images.get(row["image_id"])
            found = list(comparison.differences(label, expected))
            problems += [Problem(shard, f"{key}: {message}", (key,), row["label_offset"]) for message in found]
            lost += [(annotation, shard) for annotation in comparison.missing(label, expected)]
    for annotation, shard in lost:
        # With categories mapped by a file, those of which nothing was kept were dropped.
        if not mapped or annotation["category_id"] in comparison.categories:
            key = f"{annotation['image_id']:012d}"
            problems.append(Problem(shard, f"{key}: annotation {annotation['id']} is missing", (key,)))
    return problems + _missing_images(manifest, images, chosen)


def _missing_images(manifest: Manifest, images: Mapping[int, _Expected], chosen: set[int]) -> list[Problem]:
    name = manifest_path(Path(), manifest.split).name
    quarantined = {bad["image_id"] for bad in manifest.quarantine}
    both = tuple(f"{image_id:012d}" for image_id in sorted(chosen & quarantined))
    problems = [Problem(name, f"quarantined, yet in the shards: {some(both)}", both)] if both else []
    choosing = any(manifest.options.get(option) not in none for option, none in _CHOOSING.items())
    missing = tuple(f"{image_id:012d}" for image_id in sorted(images.keys() - chosen - quarantined))
    if missing and not choosing and _IDS not in manifest.sources:
        message = f"{len(missing)} images are neither in the shards nor on the quarantine list: {some(missing)}"
        problems.append(Problem(name, message, missing))
    return problems


class _Comparison:
    """Labels against what the JSON files say."""

    def __init__(self, instances: bool, captions: bool, *, mapped: bool, malformed: bool) -> None:
        self._instances, self._captions = instances, captions
        self._mapped, self._malformed = mapped, malformed
        self.categories: dict[int, int] = {}  #: raw id in the source -> in the shards, as met so far

    def differences(self, label: Mapping[str, Any], expected: _Expected | None) -> Iterator[str]:
        """What a label says otherwise than its source."""
        if expected is None:
            yield "the JSON files have no such image"
            return
        for name in ("file_name", "width", "height", "license"):
            if label.get(name) != expected.entry.get(name):
                yield f"{name} is {label.get(name)!r}, the JSON file says {expected.entry.get(name)!r}"
        if self._instances:
            yield from self._annotations(label, expected)
        if self._captions and label["captions"] != expected.captions:
            yield f"captions are {label['captions']!r:.200}, the JSON file says {expected.captions!r:.200}"

    def missing(self, label: Mapping[str, Any], expected: _Expected | None) -> list[Mapping[str, Any]]:
        """Annotations of the source that a label lacks."""
        stored = {annotation["id"] for annotation in label["annotations"]}
        sources = expected.annotations if expected is not None and self._instances else {}
        return [annotation for number, annotation in sources.items() if number not in stored]

    def _annotations(self, label: Mapping[str, Any], expected: _Expected) -> Iterator[str]:
        size = (label["height"], label["width"])
        if len({annotation["id"] for annotation in label["annotations"]}) != len(label["annotations"]):
            yield "two annotations have the same id"
        for annotation in label["annotations"]:
            number = annotation["id"]
            source = expected.annotations.get(number)
            if source is None:
                yield f"annotation {number} is not in the JSON file, or of no use there"
                continue
            for name in _COMPARED:
                if not self._same(name, annotation, source, size):
                    given = f"{annotation.get(name)!r:.80}, the JSON file says {source.get(name)!r:.80}"
                    yield f"{name} of annotation {number} is {given}"

    def _same(self, name: str, stored: Mapping[str, Any], source: Mapping[str, Any], size: tuple[int, int]) -> bool:
        if name == "iscrowd":
            return bool(stored[name] == int(bool(source.get(name))))
        if name == "area" and not _is_number(source.get(name)):
            return bool(stored[name] == source["bbox"][2] * source["bbox"][3])
        if name == "segmentation":
            return same_mask(stored.get(name), source.get(name), size, malformed=self._malformed)
        if name == "category_id" and self._mapped:
            return self.categories.setdefault(source[name], stored[name]) == stored[name]
        return bool(stored.get(name) == source.get(name))


def _is_usable(annotation: Mapping[str, Any], categories: set[int] | None, *, keep_crowd: bool) -> bool:
    """Whether an annotation of a COCO file belongs into a shard."""
    bbox = annotation.get("bbox")
    return (
        type(annotation.get("id")) is int
        and type(annotation.get("category_id")) is int
        and (categories is None or annotation["category_id"] in categories)
        and isinstance(bbox, list)
        and len(bbox) == 4
        and all(map(_is_number, bbox))
        and (keep_crowd or not annotation.get("iscrowd"))
    )


def same_mask(stored: Any, source: Any, size: tuple[int, int], *, malformed: bool = False) -> bool:
    """Whether a stored segmentation is that of the source, apart from what no reader could use.

    Run-length codes may be compressed or not. Polygons without three points are left out, so are codes that do not
    fill the image.

    Args:
        stored, source: the segmentations, None where there is none.
        size: (height, width).
        malformed: whether the source is known to have malformed codes, some of which cannot be told here.
    """
    if stored == source:
        return True
    if isinstance(source, list):
        usable = [polygon for polygon in source if _is_polygon(polygon)]
        return bool(usable == (stored or []))
    if not isinstance(source, dict):
        return stored is None
    if stored is None:
        return not _fills(source, size) or (malformed and isinstance(source.get("counts"), str))
    try:
        return bool(_compressed(stored, size) == _compressed(source, size))
    except (ValueError, TypeError, KeyError, OverflowError):
        return False  # no run-length code at all


def _is_polygon(value: Any) -> bool:
    return isinstance(value, list) and len(value) >= 6 and len(value) % 2 == 0 and all(map(_is_number, value))


def _fills(code: Mapping[str, Any], size: tuple[int, int]) -> bool:
    """Whether a code is one of an image of this size; of compressed ones only the size is looked at."""
    counts = code.get("counts")
    if code.get("size") != list(size) or not isinstance(counts, list | str):
        return False
    if isinstance(counts, str):
        return True
    return all(type(run) is int and run >= 0 for run in counts) and sum(counts) == size[0] * size[1]


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _compressed(code: Mapping[str, Any], size: tuple[int, int]) -> Any:
    if list(code["size"]) != list(size):
        raise ValueError(f"a code of {code['size']} in an image of {size}")
    counts = code["counts"]
    if isinstance(counts, list):
        counts = coco_mask.frPyObjects({"size": list(size), "counts": counts}, *size)["counts"]
    return counts.encode() if isinstance(counts, str) else counts


def _read_source(
    instances: Path | None, captions: Path | None, categories: set[int] | None, *, keep_crowd: bool
) -> dict[int, _Expected]:
    """Image id -> what the files say. Of two entries with the same id the first that is of use counts."""
    images: dict[int, _Expected] = {}
    described = None if instances is None else load_coco(instances)
    needed = ("images", "annotations") if described is None else ("annotations",)
    told = None if captions is None else load_coco(captions, needed)
    for entry in (described or told or {"images": []})["images"]:
        size = (entry.get("width"), entry.get("height"))
        named = type(entry.get("id")) is int and entry["id"] >= 0 and isinstance(entry.get("file_name"), str)
        if named and all(type(side) is int and 0 < side < 1 << 31 for side in size):
            images.setdefault(entry["id"], _Expected(entry))
    seen: set[int] = set()
    for entry in described["annotations"] if described else ():
        image = _image_of(entry, images)
        if image is not None and _is_usable(entry, categories, keep_crowd=keep_crowd) and entry["id"] not in seen:
            image.annotations[entry["id"]] = entry
            seen.add(entry["id"])
    for entry in told["annotations"] if told else ():
        image, caption = _image_of(entry, images), entry.get("caption")
        if image is not None and isinstance(caption, str) and caption.strip():
            image.captions.append(caption)
    return images


def _image_of(entry: Mapping[str, Any], images: Mapping[int, _Expected]) -> _Expected | None:
    return images.get(entry["image_id"]) if type(entry.get("image_id")) is int else None


def load_coco(path: Path, needed: Sequence[str] = ("annotations",)) -> dict[str, list[dict[str, Any]]]:
    """The lists of a COCO JSON file that are ever looked at; one that is not `needed` may lack and is then empty.

    Raises ValueError when the file cannot be read or is of another form.
    """
    try:
        content = orjson.loads(path.read_bytes().removeprefix(codecs.BOM_UTF8))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except orjson.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    parts: dict[str, list[dict[str, Any]]] = {}
    for name in ("images", "annotations", "categories"):
        part = content.get(name, None if name in needed else []) if isinstance(content, dict) else None
        if not isinstance(part, list) or not all(isinstance(entry, dict) for entry in part):
            raise ValueError(f"{path} is no COCO file of this kind: it needs a list {name!r} of objects")
        parts[name] = part
    return parts
