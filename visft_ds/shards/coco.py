"""COCO JSON files -> one label per image. What no reader could use is left out, counted and shown."""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
from faster_coco_eval import mask as coco_mask  # pycocotools' own warns under NumPy 2

from visft_ds.data.labels import is_box, is_near, is_polygon, is_run_length_code
from visft_ds.data.shards import Category
from visft_ds.files import MAX_PIXELS, read_bytes, reading, shown_name

#: A COCO file, or its content where it was made of another format.
CocoFile = Path | Mapping[str, Any]
_EXAMPLES = 3
_ANOTHER_FORM = "mask given as [x, y, ...], as [[x, y], ...] or as text (read as polygons)"
_NO_POLYGON = "polygon of fewer than three points, or not of numbers (left out of its mask)"
_FAR_POLYGON = "polygon with a point far outside the image (cut off there)"
_NO_MASK = "mask that is neither polygons nor a run-length code of the image (its box is kept)"
_TWICE = "duplicate annotation: same image, category, box and mask (kept)"


class Findings(dict[str, tuple[int, list[str]]]):
    """Problems of the data: kind -> (how often, the first few examples)."""

    def add(self, kind: str, example: object) -> None:
        count, examples = self.get(kind, (0, []))
        self[kind] = count + 1, [*examples, shown_name(f"{example!s:.120}")][:_EXAMPLES]

    def refuse_above_a_tenth(self, of: int, where: object, what: str) -> None:
        """Raise ValueError if there are more than a tenth of all."""
        total = sum(count for count, _ in self.values())
        if total > of / 10:
            raise ValueError(
                "\n".join([f"{where}: {total} of its {of} {what} cannot be used:", *lines_of(self)])
            )


@dataclass(frozen=True)
class FolderSplit:
    """Inputs of a build that a folder has for a split."""

    name: str
    images: Path
    instances: CocoFile | None
    captions: CocoFile | None
    maps: CocoFile | None = None  #: label maps, as instances of which no two of an image overlap
    odd: Findings = field(default_factory=Findings, kw_only=True)  #: what was odd in the layout


def lines_of(findings: Mapping[str, Sequence[Any]]) -> list[str]:
    """Findings for a person."""
    return [f"{count:>7} x {kind}, e.g. {', '.join(shown)}" for kind, (count, shown) in findings.items()]


@dataclass(slots=True)
class SourceImage:
    """An image with its labels."""

    image_id: int
    file_name: str
    width: int
    height: int
    kept: dict[str, Any]  #: licence and address: who shows an image must be able to name its author
    annotations: bytearray = field(
        default_factory=bytearray
    )  #: JSON; one growing buffer leaves no holes in the memory
    captions: list[str] = field(default_factory=list)
    objects: int = 0
    crowds: int = 0
    trainable: int = 0  #: annotations that are neither crowd nor without area inside the image
    classes: set[int] = field(default_factory=set)  #: categories of those
    sides: array[float] = field(default_factory=lambda: array("f"))  #: of those, see `Manifest.object_sides`
    wanted: bool = True  #: it was asked for
    size: int = 0  #: bytes of its file
    stamp: int = -1  #: when that was changed; -1: there is none

    def label(self) -> bytes:
        """The JSON file of this sample in a shard."""
        names = ("image_id", "file_name", "width", "height")
        fields = {name: getattr(self, name) for name in names} | self.kept
        fields["annotations"] = orjson.Fragment(b"[%b]" % bytes(self.annotations[:-1]))
        return orjson.dumps(fields | {"captions": self.captions})


@dataclass(frozen=True)
class CocoSource:
    """A COCO data set, images by ascending id."""

    images: list[SourceImage]
    categories: tuple[Category, ...]
    findings: Findings
    files: Mapping[str, Mapping[str, Any]]  #: role -> name, bytes, sha256


def read_coco(
    instances: CocoFile | None,
    captions: CocoFile | None,
    only: Path | None = None,
    ellipses: bool = False,
    maps: CocoFile | None = None,
) -> CocoSource:
    """Read COCO JSON files; without instances, the images are those of the captions file.

    `only` is a text file of image ids or file names, one a line: only these images. With `ellipses`, an
    object without a mask gets the ellipse in its box.

    Raises:
        ValueError: no COCO file; two images or categories of one id; more than a tenth of the images or
        annotations
            is unusable; nothing to learn.
    """
    findings, files = Findings(), dict[str, Mapping[str, Any]]()
    images, table, names = dict[int, SourceImage](), dict[int, str](), set[str]()
    if only is not None:
        with reading(only, "a list of image ids or file names"):
            names = {line.strip() for line in _read(only, "ids", files).decode("utf-8-sig").splitlines()} - {
                ""
            }
    for role, place in {"instances": instances, "maps": maps, "captions": captions}.items():
        if place is None:
            continue
        where = place if isinstance(place, Path) else f"the {role}"
        with reading(where, f"a COCO file of {role}"):
            content = orjson.loads(_read(place, role, files).removeprefix(b"\xef\xbb\xbf"))
            images = images or _images(content["images"], where, findings)
            for image in images.values() if only is not None else ():
                image.wanted = str(image.image_id) in names or image.file_name in names
            if role == "captions":
                lost = _add_captions(content["annotations"], images, findings, instances is not None)
            else:
                for category in content["categories"]:
                    number, name = category.get("id"), category.get("name")
                    if (
                        type(number) is not int
                        or number in table
                        or type(name) is not str
                        or not name.strip()
                    ):
                        raise ValueError(f"category {category!r:.100} needs a unique id and a name")
                    table[number] = name
                lost = _add_annotations(content["annotations"], images, table, findings, ellipses)
            lost.refuse_above_a_tenth(len(content["annotations"]), where, "annotations")
            findings.update(lost)
    chosen = [images[number] for number in sorted(images) if images[number].wanted]
    if missing := names - {str(image.image_id) for image in chosen} - {image.file_name for image in chosen}:
        raise ValueError(
            f"{only}: {len(missing)} of its {len(names)} lines name no image: {sorted(missing)[:3]}"
        )
    # 1 x 1 stands for a file that cannot be read, which is the better reason
    if not any(image.trainable or image.captions or image.width * image.height == 1 for image in chosen):
        raise ValueError(
            f"{where}: none of its {len(chosen)} images has an object or a caption to learn from"
        )
    categories = tuple(Category(place, number, table[number]) for place, number in enumerate(sorted(table)))
    return CocoSource(chosen, categories, findings, files)


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
            lost.add("image with an impossible id or size", f"{name} (id {number}, {width} x {height})")
        elif number in images:
            if images[number].file_name != name:
                raise ValueError(f"{name} and {images[number].file_name} both have the id {number}")
            findings.add("image listed twice", name)
        else:
            kept = {
                key: entry[key] for key in ("license", "flickr_url") if type(entry.get(key)) in (int, str)
            }
            images[number] = SourceImage(number, name, width, height, kept)
    lost.refuse_above_a_tenth(len(entries), where, "images")
    findings.update(lost)
    return images


def _add_captions(
    entries: Any, images: Mapping[int, SourceImage], findings: Findings, strangers: bool
) -> Findings:
    """Give the captions to their images; returns those that cannot be used.

    `strangers`: they may be of more images than there are, as of a part of COCO the captions of all are often
    given.
    """
    lost, unknown = Findings(), Findings()
    for entry in entries:
        image, text = images.get(entry.get("image_id")), entry.get("caption")
        if image is None:
            unknown.add("caption without image", f"caption {entry.get('id')}")
        elif not isinstance(text, str) or not text.strip():
            lost.add("caption without text", f"caption {entry.get('id')}")
        else:
            image.captions.append(text)
    known = any(image.captions for image in images.values())
    (findings if strangers and known else lost).update(unknown)
    return lost


def _add_annotations(
    entries: Any,
    images: Mapping[int, SourceImage],
    categories: Mapping[int, str],
    findings: Findings,
    ellipses: bool,
) -> Findings:
    """Give the annotations to their images; returns those that cannot be used."""
    lost, apart, masks, seen = Findings(), list[str](), 0, set[int]()
    contents = set[int]()  # hashes of annotations without their ids
    for entry in entries:
        number, category, crowd = (entry.get(key) for key in ("id", "category_id", "iscrowd"))
        box: Any = entry.get("bbox")
        image, where = images.get(entry.get("image_id")), f"annotation {number}"
        if image is None:
            lost.add("annotation without image", where)
        elif type(category) is not int or category not in categories:
            lost.add("annotation of unknown category", f"{where}: {category}")
        elif type(number) is not int or number in seen:
            lost.add("annotation without a unique id", where)
        elif not is_box(box, image.height, image.width) or crowd not in (None, 0, 1):
            lost.add("malformed box or crowd flag, or a box far outside the image", f"{where}: {box}")
        elif image.wanted:
            seen.add(number)
            x, y, width, height = box
            right, bottom, area = x + width, y + height, entry.get("area")
            seen_width = min(right, image.width) - max(x, 0)
            seen_height = min(bottom, image.height) - max(y, 0)
            useful = seen_width > 0 and seen_height > 0
            area = area if type(area) in (int, float) else width * height
            stored = {
                "id": number,
                "bbox": box,
                "category_id": category,
                "iscrowd": int(bool(crowd)),
                "area": area,
            }
            segmentation, odd = stored_segmentation(entry.get("segmentation"), image.height, image.width)
            drawn = ellipses and useful and not segmentation and not crowd
            segmentation = [_ellipse(*box)] if drawn else segmentation
            if segmentation is not None:
                stored["segmentation"] = segmentation
            data = orjson.dumps(stored)
            content = hash((image.image_id, data[data.index(b",") :]))  # behind its id
            image.annotations += data + b","
            image.objects += 1
            image.crowds += bool(crowd)
            image.trainable += useful and not crowd
            if useful and not crowd:
                image.classes.add(category)
                image.sides.append(math.sqrt(seen_width * seen_height / (image.width * image.height)))
            for kind in odd:
                if kind != _NO_MASK:
                    findings.add(kind, where)
            for kind, found in (
                ("mask drawn as an ellipse into its box", drawn),
                ("crowd (kept; training leaves it out)", crowd),
                ("box without area (kept; training leaves it out)", not useful),
                ("instance without mask", not segmentation and not crowd),
            ):
                if found:
                    findings.add(kind, where)
            if min(x, y) < -1 or right > image.width + 1 or bottom > image.height + 1 or 0 < max(box) <= 1:
                kind = "box beyond the image or within a pixel (kept; COCO has x y width height in pixels)"
                lost.add(kind, f"{where}: {box} in {image.width} x {image.height}")
            elif content in contents:
                lost.add(_TWICE, where)
            elif _NO_MASK in odd:
                lost.add(_NO_MASK, f"{where}: {entry['segmentation']!r:.60}")
            elif segmentation and not crowd and (extent := _extent(segmentation)):
                masks += 1
                if sum(abs(a - b) for a, b in zip(extent, (x, y, right, bottom), strict=True)) > 4:
                    apart.append(f"{where}: {box}")
            contents.add(content)
    for example in apart if len(apart) > masks / 10 else ():
        findings.add("mask more than a pixel from its box", example)
    return lost


def stored_segmentation(mask: Any, height: int, width: int) -> tuple[Any, list[str]]:
    """(polygons of three points or more, a run-length code with its counts as text, or None; problems)."""
    odd = list[str]()
    if isinstance(mask, str):
        odd.append(_ANOTHER_FORM)
        try:
            mask = orjson.loads(mask)
        except orjson.JSONDecodeError:
            return None, [_NO_MASK]
    if mask is None or mask == []:
        return mask, []
    if isinstance(mask, Mapping):
        code = _run_length_code(mask, height, width)
        return code, [_NO_MASK] if code is None else odd
    if not isinstance(mask, list):
        return None, [_NO_MASK]
    polygons = _polygons(mask)
    if polygons is not mask and not odd:
        odd.append(_ANOTHER_FORM)
    good = [polygon for polygon in polygons if is_polygon(polygon)]
    if not good:
        return None, [_NO_MASK]
    if len(good) < len(polygons):
        odd.append(_NO_POLYGON)
    for number, polygon in enumerate(good):
        if not is_near(polygon, height, width):
            odd.append(_FAR_POLYGON)
            good[number] = _cut_off(polygon, height, width)
    return good, odd


def _polygons(mask: list[Any]) -> list[Any]:
    """Polygons in COCO's form, of a list of numbers, of points, or of lists of points; any other list as it
    is.
    """
    if all(map(_is_number, mask)):
        return [mask]
    if all(map(_is_point, mask)):
        return [[number for point in mask for number in point]]
    if all(isinstance(polygon, list) and polygon and all(map(_is_point, polygon)) for polygon in mask):
        return [[number for point in polygon for number in point] for polygon in mask]
    return mask


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _is_point(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_number, value))


def _cut_off(polygon: list[float], height: int, width: int) -> list[float]:
    """The polygon with points that lie more than one image away moved to that distance."""
    sides = (width, height)
    return [min(max(number, -sides[axis % 2]), 2 * sides[axis % 2]) for axis, number in enumerate(polygon)]


def _run_length_code(given: Mapping[str, Any], height: int, width: int) -> dict[str, Any] | None:
    """A run-length code with its counts as text; None if it does not fill the image."""
    if given.get("size") != [height, width]:
        return None
    counts = given.get("counts")
    if isinstance(counts, list):
        if not all(type(count) is int and count >= 0 for count in counts) or sum(counts) != height * width:
            return None
        counts = coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)[
            "counts"
        ].decode()
    code = {"size": [height, width], "counts": counts}
    return code if is_run_length_code(code, height, width) else None


def _ellipse(x: float, y: float, width: float, height: float) -> list[float]:
    """The polygon of 32 points that touches the sides of a box."""
    turns = [2 * math.pi * place / 32 for place in range(32)]
    points = ((x + width * (1 + math.cos(a)) / 2, y + height * (1 + math.sin(a)) / 2) for a in turns)
    return [round(value, 2) for point in points for value in point]


def _extent(segmentation: Any) -> tuple[float, float, float, float] | None:
    """(x1, y1, x2, y2) of a mask; None for an empty one."""
    if isinstance(segmentation, Mapping):
        x, y, width, height = map(float, coco_mask.toBbox(dict(segmentation)))
        return (x, y, x + width, y + height) if width and height else None
    xs = [x for polygon in segmentation for x in polygon[::2]]
    ys = [y for polygon in segmentation for y in polygon[1::2]]
    return min(xs), min(ys), max(xs), max(ys)
