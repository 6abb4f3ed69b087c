"""COCO JSON files -> one label per image. What no reader could use is left out, counted and shown."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
from faster_coco_eval import mask as coco_mask  # pycocotools' own warns under NumPy 2

from visft_ds.data.labels import has_area
from visft_ds.data.shards import Category
from visft_ds.files import MAX_PIXELS, read_bytes, reading

#: A COCO file, or its content where it was made of another format.
CocoFile = Path | Mapping[str, Any]
MOST_LOST = 0.1  # share of images, or of annotations, that may be unusable
_EXAMPLES = 3


class Findings(dict[str, tuple[int, list[str]]]):
    """What was odd: kind -> (how often, the first few examples)."""

    def add(self, kind: str, example: object) -> None:
        count, examples = self.get(kind, (0, []))
        self[kind] = count + 1, [*examples, f"{example!s:.120}"][:_EXAMPLES]

    @property
    def total(self) -> int:
        return sum(count for count, _ in self.values())

    def refuse_above_a_tenth(self, of: int, where: object, what: str) -> None:
        """Raise ValueError if there are more than a tenth of all."""
        if self.total > MOST_LOST * of:
            raise ValueError("\n".join([f"{where}: {self.total} of its {of} {what} cannot be used:", *lines_of(self)]))


def lines_of(findings: Mapping[str, Sequence[Any]]) -> list[str]:
    """Findings for a person."""
    return [f"{count:>7} x {kind}, for instance {', '.join(shown)}" for kind, (count, shown) in findings.items()]


@dataclass(slots=True)
class SourceImage:
    """An image with its labels."""

    image_id: int
    file_name: str
    width: int
    height: int
    kept: dict[str, Any]  #: licence and address: who shows an image must be able to name its author
    annotations: list[bytes] = field(default_factory=list)  #: JSON; as objects, those of COCO take ten times the room
    captions: list[str] = field(default_factory=list)
    crowds: int = 0
    trainable: int = 0  #: annotations that are neither crowd nor without area inside the image

    def label(self) -> bytes:
        """The JSON file of this sample in a shard."""
        names = ("image_id", "file_name", "width", "height")
        fields = {name: getattr(self, name) for name in names} | self.kept
        fields["annotations"] = orjson.Fragment(b"[%b]" % b",".join(self.annotations))
        return orjson.dumps(fields | {"captions": self.captions})


@dataclass(frozen=True)
class CocoSource:
    """A COCO data set, images by ascending id."""

    images: list[SourceImage]
    categories: tuple[Category, ...]
    findings: Findings
    files: Mapping[str, Mapping[str, Any]]  #: role -> name, bytes, sha256


def read_coco(instances: CocoFile | None, captions: CocoFile | None, only: Path | None = None) -> CocoSource:
    """Read COCO JSON files; without instances, the images are those of the captions file.

    Args:
        only: a text file of image ids or file names, one a line: only these images.

    Raises:
        ValueError: no COCO file; two images or categories of one id; more than a tenth of the images or annotations
            is unusable; nothing to learn.
    """
    findings, files, names = Findings(), dict[str, Mapping[str, Any]](), set[str]()
    images, wanted, table = dict[int, SourceImage](), dict[int, SourceImage](), dict[int, str]()
    if only is not None:
        with reading(only, "a list of image ids or file names"):
            names = {line.strip() for line in _read(only, "ids", files).decode("utf-8-sig").splitlines()} - {""}
    for role, place in {"instances": instances, "captions": captions}.items():
        if place is None:
            continue
        where = place if isinstance(place, Path) else f"the {role}"
        with reading(where, f"a COCO file of {role}"):
            content = orjson.loads(_read(place, role, files).removeprefix(b"\xef\xbb\xbf"))
            if not images:
                wanted = images = _images(content["images"], where, findings)
            if only is not None:
                wanted = {n: one for n, one in images.items() if str(n) in names or one.file_name in names}
            if role == "captions":
                _add_captions(content["annotations"], images, wanted, where, findings, strangers=instances is not None)
                continue
            for category in content["categories"]:
                if type(category["id"]) is not int or type(category["name"]) is not str or category["id"] in table:
                    raise ValueError(f"category {category!r:.100} needs an id of its own and a name")
                table[category["id"]] = category["name"]
            taker = _Annotations(images, wanted, table, findings)
            for annotation in content["annotations"]:
                taker.add(annotation)
            taker.finish(where)
    if missing := names - {str(number) for number in wanted} - {image.file_name for image in wanted.values()}:
        raise ValueError(f"{only}: {len(missing)} of its {len(names)} lines name no image: {sorted(missing)[:3]}")
    # 1 x 1 stands for a file that cannot be read, which is the better reason
    if not any(image.trainable or image.captions or image.width * image.height == 1 for image in wanted.values()):
        raise ValueError(f"{where}: none of its {len(wanted)} images has an object or a caption to learn from")
    categories = tuple(Category(place, number, table[number]) for place, number in enumerate(sorted(table)))
    return CocoSource([wanted[number] for number in sorted(wanted)], categories, findings, files)


def _read(place: CocoFile, role: str, files: dict[str, Mapping[str, Any]]) -> bytes:
    data = read_bytes(place) if isinstance(place, Path) else orjson.dumps(place)
    name = place.name if isinstance(place, Path) else role
    files[role] = {"name": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    return data


def _images(entries: list[dict[str, Any]], where: object, findings: Findings) -> dict[int, SourceImage]:
    images, lost = dict[int, SourceImage](), Findings()
    for entry in entries:
        number, width, height, name = (entry.get(key) for key in ("id", "width", "height", "file_name"))
        if not type(number) is type(width) is type(height) is int or type(name) is not str:
            lost.add("image without id, size or file_name", f"{name} (id {number!r:.20})")
        elif not 0 <= number < 1 << 63 or min(width, height) < 1 or width * height > MAX_PIXELS:
            lost.add("image of impossible id or size", f"{name} (id {number}, {width} x {height})")
        elif number in images:
            if images[number].file_name != name:
                raise ValueError(f"{name} and {images[number].file_name} both have the id {number}")
            findings.add("image listed twice", name)
        else:
            kept = {key: entry[key] for key in ("license", "flickr_url") if type(entry.get(key)) in (int, str)}
            images[number] = SourceImage(number, name, width, height, kept)
    lost.refuse_above_a_tenth(len(entries), where, "images")
    findings.update(lost)
    return images


def _add_captions(
    entries: list[dict[str, Any]],
    images: Mapping[int, SourceImage],
    wanted: Mapping[int, SourceImage],
    where: object,
    findings: Findings,
    *,
    strangers: bool,
) -> None:
    """Give the captions to their images.

    Args:
        strangers: they may be of more images than there are: of a part of COCO, the captions of all are often given.
    """
    lost, unknown, taken = Findings(), Findings(), 0
    for entry in entries:
        image, text = images.get(_id_of_image(entry)), entry.get("caption")
        if image is None:
            unknown.add("caption without image", f"caption {entry.get('id')}")
        elif not isinstance(text, str) or not text.strip():
            lost.add("caption without text", f"caption {entry.get('id')}")
        elif image.image_id in wanted:
            image.captions.append(text)
        taken += image is not None
    if strangers and taken:
        findings.update(unknown)
    else:
        lost.update(unknown)
    lost.refuse_above_a_tenth(len(entries), where, "captions")
    findings.update(lost)


@dataclass
class _Annotations:
    """Takes the annotations of a file one by one and gives each to its image."""

    images: Mapping[int, SourceImage]
    wanted: Mapping[int, SourceImage]
    categories: Mapping[int, str]
    findings: Findings
    lost: Findings = field(default_factory=Findings)
    apart: Findings = field(default_factory=Findings)  #: masks that are not where their boxes are
    seen: set[int] = field(default_factory=set)
    taken: int = 0
    masks: int = 0

    def add(self, entry: dict[str, Any]) -> None:
        number, category, crowd = (entry.get(key) for key in ("id", "category_id", "iscrowd"))
        box: Any = entry.get("bbox")
        image, where = self.images.get(_id_of_image(entry)), f"annotation {number}"
        if image is not None and image.image_id not in self.wanted:
            return
        self.taken += 1
        if image is None:
            return self.lost.add("annotation without image", where)
        if type(category) is not int or category not in self.categories:
            return self.lost.add("annotation of unknown category", f"{where}: {category}")
        if type(number) is not int or number in self.seen:
            return self.lost.add("annotation without an id of its own", where)
        if not _is_box(box) or crowd not in (None, 0, 1):
            return self.lost.add("box or crowd flag malformed", f"{where}: {box}")
        self.seen.add(number)
        x, y, width, height = box
        useful, area = has_area(box, image.width, image.height), entry.get("area")
        area = area if type(area) in (int, float) else width * height
        stored = {"id": number, "bbox": box, "category_id": category, "iscrowd": int(bool(crowd)), "area": area}
        segmentation = stored_segmentation(entry.get("segmentation"), image.height, image.width)
        if segmentation is not None:
            stored["segmentation"] = segmentation
        for kind, seen in (
            ("crowd (kept; training leaves it out)", crowd),
            ("box without area (kept; training leaves it out)", not useful),
            ("instance without mask", not segmentation and not crowd),
        ):
            if seen:
                self.findings.add(kind, where)
        image.crowds += bool(crowd)
        image.trainable += useful and not crowd
        image.annotations.append(orjson.dumps(stored))
        right, bottom = x + width, y + height
        if min(x, y) < -1 or right > image.width + 1 or bottom > image.height + 1 or 0 < max(box) <= 1:
            kind = "box beyond the image or within a pixel (kept; COCO has x y width height in pixels)"
            return self.lost.add(kind, f"{where}: {box} in {image.width} x {image.height}")
        extent = None if crowd or not segmentation else _extent(segmentation)
        self.masks += extent is not None
        if extent and sum(abs(a - b) for a, b in zip(extent, (x, y, right, bottom), strict=True)) > 4:
            self.apart.add("mask more than a pixel from its box", f"{where}: {box}")

    def finish(self, where: object) -> None:
        """Raises ValueError if more than a tenth is lost."""
        self.lost.refuse_above_a_tenth(self.taken, where, "annotations")
        self.findings.update(self.lost)
        if self.apart.total > MOST_LOST * self.masks:
            self.findings.update(self.apart)


def _id_of_image(entry: Mapping[str, Any]) -> int:
    number = entry.get("image_id")
    return number if type(number) is int else -1  # which no image has


def _is_box(box: Any) -> bool:
    numbers = isinstance(box, list) and len(box) == 4 and all(type(number) in (int, float) for number in box)
    return numbers and all(map(math.isfinite, box))


def stored_segmentation(given: Any, height: int, width: int) -> Any:
    """Polygons of three points or more, a run-length code with its counts as text, or None."""
    if isinstance(given, list):
        good = [polygon for polygon in given if _is_polygon(polygon)]
        return good if good or not given else None
    if not isinstance(given, Mapping) or given.get("size") != [height, width]:
        return None
    code = {"size": [height, width], "counts": given.get("counts")}
    try:
        if isinstance(code["counts"], list):
            code["counts"] = coco_mask.frPyObjects(code, height, width)["counts"].decode("ascii")
        coco_mask.decode(code)  # its runs fill the image
    except (ValueError, RuntimeError, TypeError):
        return None
    return code


def _is_polygon(given: Any) -> bool:
    try:  # `sum` is the fastest way over millions of numbers: it fails for text, objects and null
        return isinstance(given, list) and len(given) >= 6 and len(given) % 2 == 0 and math.isfinite(sum(given))
    except (TypeError, OverflowError):
        return False


def _extent(segmentation: Any) -> tuple[float, float, float, float] | None:
    """(x1, y1, x2, y2) of a mask; None for an empty one."""
    if isinstance(segmentation, Mapping):
        x, y, width, height = map(float, coco_mask.toBbox(dict(segmentation)))
        return (x, y, x + width, y + height) if width and height else None
    xs = [x for polygon in segmentation for x in polygon[::2]]
    ys = [y for polygon in segmentation for y in polygon[1::2]]
    return min(xs), min(ys), max(xs), max(ys)
