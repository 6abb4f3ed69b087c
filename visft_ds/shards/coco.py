"""COCO JSON files -> one label per image. What no reader could use is left out, counted and shown."""

from __future__ import annotations

import itertools
import math
from array import array
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
from faster_coco_eval import mask as coco_mask  # pycocotools' own warns under NumPy 2

from visft_ds.data.labels import is_box, is_near, is_polygon, run_length_code
from visft_ds.data.shards import Category
from visft_ds.files import MAX_PIXELS, read_bytes, reading
from visft_ds.settings.task_schema import WITHOUT_MASK
from visft_ds.shards.common import (
    CocoFile,
    Corners,
    Findings,
    FolderSplit,
    SecondPicture,
    extent_of,
    json_of,
    name_here,
    source_of,
)
from visft_ds.shards.corrections import corrected
from visft_ds.shards.panoptic import PanopticMaps

_ANOTHER_FORM = "mask given as [x, y, ...], as [[x, y], ...] or as text (read as polygons)"
_NO_POLYGON = "polygon of fewer than three points, or not of numbers (left out of its mask)"
_FAR_POLYGON = "polygon with a point far outside the image (cut off there)"
_NO_MASK = "mask that is neither polygons nor a run-length code of the image (its box is kept)"
_ELLIPSE = "mask drawn as an ellipse into its box"
_BEYOND = "box beyond the image or within a pixel (kept; COCO has x y width height in pixels)"
_TWICE = "duplicate annotation: same image, category, box and mask (kept)"

Files = dict[str, Mapping[str, Any]]  # role -> name, bytes, sha256


@dataclass(slots=True)
class SourceImage:
    """An image with its labels."""

    image_id: int
    file_name: str
    width: int
    height: int
    credit: Mapping[str, Any]  #: licence and address: who shows an image must be able to name its author
    #: JSON; one growing buffer leaves no holes in the memory
    annotations: bytearray = field(default_factory=bytearray)
    captions: list[str] = field(default_factory=list)
    objects: int = 0
    crowds: int = 0
    trainable: int = 0  #: annotations that are neither crowd nor without area inside the image
    classes: set[int] = field(default_factory=set)  #: categories of those
    sides: array[float] = field(default_factory=lambda: array("f"))  #: of those, see `Manifest.object_sides`
    selected: bool = True  #: it was asked for
    file_bytes: int = 0
    modified: int = -1  #: time of its file, nanoseconds; -1: there is none
    maps: dict[str, SecondPicture] = field(default_factory=dict)  #: "depth" and "panoptic", if it has them
    segments: tuple[Mapping[str, int], ...] = ()  #: of its panoptic map

    def add(self, annotation: bytes, category: int, crowd: bool, share: float) -> None:
        """Add an annotation as a label has it, whose box covers a share of the image."""
        self.annotations += annotation + b","
        self.objects += 1
        self.crowds += crowd
        if share and not crowd:
            self.trainable += 1
            self.classes.add(category)
            self.sides.append(math.sqrt(share))

    def label(self, **maps: Mapping[str, Any]) -> bytes:
        """The JSON file of this sample in a shard, with maps by their kind."""
        content = {
            "image_id": self.image_id,
            "file_name": self.file_name,
            "width": self.width,
            "height": self.height,
            **self.credit,
            "annotations": orjson.Fragment(b"[%b]" % bytes(self.annotations[:-1])),
            "captions": self.captions,
            **maps,
        }
        return orjson.dumps(content)


@dataclass(frozen=True)
class CocoSource:
    """A COCO data set, images by ascending id."""

    images: list[SourceImage]
    categories: tuple[Category, ...]
    findings: Findings
    files: Files


def read_coco(inputs: FolderSplit, ids: Path | None = None, ellipses: bool = False) -> CocoSource:
    """Read the COCO JSON files of a split; without instances, the images are those of the captions file, or
    those that have a depth or panoptic map.

    `ids` is a text file of image ids or file names, one a line: only these images. With `ellipses`, an object
    without a mask gets the ellipse in its box.

    Raises:
        ValueError: no COCO file; two images or categories of one id; more than a tenth of the images or
            annotations is unusable; too few images to divide; nothing to learn.
    """
    findings = Findings()
    files = Files()
    selection = None if ids is None else _read_selection(ids, files)
    images = dict[int, SourceImage]()
    categories = dict[int, str]()
    depth = inputs.depth
    panoptic = inputs.panoptic
    sources: dict[str, CocoFile | None] = {
        "instances": inputs.instances,
        "maps": inputs.maps,
        "captions": inputs.captions,
        "depth": depth.listing if depth else None,
        "panoptic": panoptic.listing if panoptic else None,
    }
    for role, source in sources.items():
        if source is None:
            continue
        where = source if isinstance(source, Path) else f"the {role}"
        what = f"a COCO file of {role}"
        with reading(where, what):
            content = json_of(_read(source, role, files))
            entries = content["annotations"]
            listed_images = images or _read_images(content["images"], where, findings, selection)
            if role != "captions":
                add_categories(content["categories"], categories)
        if not images:
            images = listed_images
            if selection is not None:
                _check_selection(selection, images.values(), ids)
            if inputs.division is not None:
                selected = {image.file_name for image in images.values() if image.selected}
                validation = inputs.division.validation(selected)
                for image in images.values():
                    image.selected &= (image.file_name in validation) == (inputs.name == "val")
        if inputs.corrections is not None:
            files["corrections"] = inputs.corrections.source
            names = {image.file_name: number for number, image in images.items()}
            entries = corrected(role, entries, names, categories, inputs.corrections, findings)
        with reading(where, what):
            if role == "captions":
                # The captions of all of COCO are often given for a part of it.
                unusable = _add_captions(
                    entries, images, findings, of_other_images=inputs.instances is not None
                )
            else:
                reader = _AnnotationReader(images, categories, findings, ellipses)
                unusable = reader.read(entries)
            unusable.refuse_above_a_tenth(len(entries), where, "annotations")
            findings.update(unusable)
    chosen = [images[number] for number in sorted(images) if images[number].selected]
    if panoptic is not None:
        files["panoptic"] = panoptic.file
        _check_names(categories, panoptic)
    # 1 x 1 stands for a file that cannot be read, which is the better reason
    if (
        depth is None
        and panoptic is None
        and not any(image.trainable or image.captions or image.width == image.height == 1 for image in chosen)
    ):
        raise ValueError(
            f"{where}: none of its {len(chosen)} images has an object or a caption to learn from"
        )
    return CocoSource(chosen, listed_categories(categories), findings, files)


def listed_categories(names: Mapping[int, str]) -> tuple[Category, ...]:
    """Categories, id -> name, in the order of their ids."""
    return tuple(Category(label, number, names[number]) for label, number in enumerate(sorted(names)))


def _check_names(categories: Mapping[int, str], panoptic: PanopticMaps) -> None:
    """Raise ValueError for a panoptic category whose id means another one to the other labels."""
    for category in panoptic.categories:
        name = categories.get(category.coco_id, category.name)
        if name != category.name:
            raise ValueError(
                f"{panoptic.file['name']}: category {category.coco_id} is {category.name!r}, and {name!r} in "
                "the other labels: give both the same categories"
            )


def name_as_here(source: CocoSource, folder: Path) -> None:
    """Call images that a path of another machine names as they are called in the folder.

    Raises ValueError if such an image has the file of another one.
    """
    renamed = dict[str, str]()  # name here -> name in the annotations
    for image in source.images:
        name = name_here(folder, image.file_name)
        if name is not None:
            source.findings.add(
                "image named by a path of another machine (its end was found)", image.file_name
            )
            renamed[name] = image.file_name
            image.file_name = name
    counts = Counter(image.file_name for image in source.images)
    for name, original in renamed.items():
        if counts[name] > 1:
            raise ValueError(
                f"{counts[name]} images, one called {original}, are the same file {folder / name}: "
                "give file names below the folder of the images"
            )


def _read(source: CocoFile, role: str, files: Files) -> bytes:
    """Content of a file, which is noted among the `files` of the split."""
    if isinstance(source, Path):
        name = source.name
        data = read_bytes(source)
    else:
        name = role
        data = orjson.dumps(source)
    files[role] = source_of(name, data)
    return data


def _read_selection(path: Path, files: Files) -> set[str]:
    """The image ids or file names in a text file."""
    with reading(path, "a list of image ids or file names"):
        text = _read(path, "ids", files).decode("utf-8-sig")
    return {line.strip() for line in text.splitlines()} - {""}


def _check_selection(selection: Collection[str], images: Collection[SourceImage], ids: Path | None) -> None:
    """Raise ValueError unless each line of the file `ids` names one of the images."""
    names = {image.file_name for image in images}
    numbers = {str(image.image_id) for image in images}
    missing = sorted(set(selection) - names - numbers)
    if missing:
        raise ValueError(
            f"--ids {ids}: {len(missing)} of {len(selection)} entries match no image: {missing[:3]}"
        )


def _read_images(
    entries: Sequence[Any],
    where: object,
    findings: Findings,
    selection: Collection[str] | None,
) -> dict[int, SourceImage]:
    """The images of a COCO file by their ids."""
    images = dict[int, SourceImage]()
    unusable = Findings()
    for entry in entries:
        number = entry.get("id")
        name = entry.get("file_name")
        width = entry.get("width")
        height = entry.get("height")
        if not type(number) is type(width) is type(height) is int or type(name) is not str:
            unusable.add("image without id, size or file_name", f"{name} (id {number!r:.20})")
        elif not 0 <= number < 1 << 63 or min(width, height) < 1 or width * height > MAX_PIXELS:
            unusable.add("image with an impossible id or size", f"{name} (id {number}, {width} x {height})")
        elif number not in images:
            credit = {
                key: entry[key] for key in ("license", "flickr_url") if type(entry.get(key)) in (int, str)
            }
            image = SourceImage(number, name, width, height, credit)
            image.selected = selection is None or str(number) in selection or name in selection
            images[number] = image
        elif images[number].file_name == name:
            findings.add("image listed twice", name)
        else:
            raise ValueError(f"{name} and {images[number].file_name} both have the id {number}")
    unusable.refuse_above_a_tenth(len(entries), where, "images")
    findings.update(unusable)
    return images


def add_categories(entries: Sequence[Any], categories: dict[int, str]) -> None:
    """Add the categories of a COCO file, id -> name; each must have both, and no id may come twice."""
    for entry in entries:
        number = entry.get("id")
        name = entry.get("name")
        if type(number) is not int or number in categories or type(name) is not str or not name.strip():
            raise ValueError(f"category {entry!r:.100} needs a unique id and a name")
        categories[number] = name


def _add_captions(
    entries: Sequence[Any],
    images: Mapping[int, SourceImage],
    findings: Findings,
    of_other_images: bool,
) -> Findings:
    """Give the captions to their images; returns those that cannot be used.

    If some may be `of_other_images`, those count as used as soon as one is of these images.
    """
    unusable = Findings()
    without_image = Findings()
    for entry in entries:
        image = images.get(entry.get("image_id"))
        text = entry.get("caption")
        example = f"caption {entry.get('id')}"
        if image is None:
            without_image.add("caption without image", example)
        elif not isinstance(text, str) or not text.strip():
            unusable.add("caption without text", example)
        else:
            image.captions.append(text)
    if of_other_images and any(image.captions for image in images.values()):
        findings.update(without_image)
    else:
        unusable.update(without_image)
    return unusable


@dataclass
class _AnnotationReader:
    """Annotations of a COCO file, given to their images one by one."""

    images: Mapping[int, SourceImage]
    categories: Mapping[int, str]
    findings: Findings
    ellipses: bool
    unusable: Findings = field(default_factory=Findings)
    ids: set[int] = field(default_factory=set)
    contents: set[int] = field(default_factory=set)  #: hashes of annotations without their ids
    masks: int = 0  #: that were compared with their boxes
    far_masks: list[str] = field(default_factory=list)  #: examples of those that do not fit

    def read(self, entries: Sequence[Any]) -> Findings:
        """Give all annotations to their images; returns those that cannot be used."""
        for entry in entries:
            problem = self._problem(entry)
            if problem is not None:
                self.unusable.add(*problem)
            elif self.images[entry["image_id"]].selected:
                self._add(entry, self.images[entry["image_id"]])
        if len(self.far_masks) > self.masks / 10:
            for example in self.far_masks:
                self.findings.add("mask more than a pixel from its box", example)
        return self.unusable

    def _problem(self, entry: Any) -> tuple[str, str] | None:
        """Reason why an annotation is left out, kind and example; None: it is usable."""
        number = entry.get("id")
        category = entry.get("category_id")
        box = entry.get("bbox")
        image = self.images.get(entry.get("image_id"))
        name = f"annotation {number}"
        if image is None:
            return "annotation without image", name
        if type(category) is not int or category not in self.categories:
            return "annotation of unknown category", f"{name}: {category}"
        if type(number) is not int or number in self.ids:
            return "annotation without a unique id", name
        if not is_box(box, image.height, image.width) or entry.get("iscrowd") not in (None, 0, 1):
            return "malformed box or crowd flag, or a box far outside the image", f"{name}: {box}"
        return None

    def _add(self, entry: Any, image: SourceImage) -> None:
        """Give a usable annotation to its image, and note what is odd about it."""
        name = f"annotation {entry['id']}"
        box = entry["bbox"]
        corners = (box[0], box[1], box[0] + box[2], box[1] + box[3])
        crowd = bool(entry.get("iscrowd"))
        inside = share_inside(corners, image)
        segmentation, problems = stored_segmentation(entry.get("segmentation"), image.height, image.width)
        no_mask = _NO_MASK in problems
        if no_mask:
            problems.remove(_NO_MASK)
        if self.ellipses and inside and not segmentation and not crowd:
            segmentation = [_ellipse(*box)]
            problems.append(_ELLIPSE)
        if crowd:
            problems.append("crowd (kept; training leaves it out)")
        if not inside:
            problems.append("box without area (kept; training leaves it out)")
        if not segmentation and not crowd:
            problems.append(WITHOUT_MASK)
        for kind in problems:
            self.findings.add(kind, name)
        self.ids.add(entry["id"])
        data = _stored(entry, segmentation)
        image.add(data, entry["category_id"], crowd, inside)
        content = hash((image.image_id, data[data.index(b",") :]))  # behind its id
        if _reaches_beyond(corners, image) or 0 < max(box) <= 1:
            self.unusable.add(_BEYOND, f"{name}: {box} in {image.width} x {image.height}")
        elif content in self.contents:
            self.unusable.add(_TWICE, name)
        elif no_mask:
            self.unusable.add(_NO_MASK, f"{name}: {entry['segmentation']!r:.60}")
        elif segmentation and not crowd:
            extent = _extent(segmentation)
            if extent is not None:
                self.masks += 1
                distance = sum(abs(a - b) for a, b in zip(extent, corners, strict=True))
                if distance > 4:
                    self.far_masks.append(f"{name}: {box}")
        self.contents.add(content)


def share_inside(corners: Corners, image: SourceImage) -> float:
    """Share of the image that a box covers; 0 for a box without area or outside the image."""
    left, top, right, bottom = corners
    across = min(right, image.width) - max(left, 0)
    down = min(bottom, image.height) - max(top, 0)
    if across <= 0 or down <= 0:
        return 0.0
    return across * down / (image.width * image.height)


def _reaches_beyond(corners: Corners, image: SourceImage) -> bool:
    """Return True for a box that ends more than a pixel beyond the image."""
    left, top, right, bottom = corners
    return min(left, top) < -1 or right > image.width + 1 or bottom > image.height + 1


def _stored(entry: Any, segmentation: Any) -> bytes:
    """An annotation as a label in a shard has it."""
    _, _, width, height = entry["bbox"]
    area = entry.get("area")
    stored = {
        "id": entry["id"],
        "bbox": entry["bbox"],
        "category_id": entry["category_id"],
        "iscrowd": int(bool(entry.get("iscrowd"))),
        "area": area if _is_number(area) else width * height,
    }
    if segmentation is not None:
        stored["segmentation"] = segmentation
    return orjson.dumps(stored)


def stored_segmentation(mask: Any, height: int, width: int) -> tuple[Any, list[str]]:
    """(polygons of three points or more, a run-length code with its counts as text, or None; problems)."""
    problems = list[str]()
    if isinstance(mask, str):
        problems.append(_ANOTHER_FORM)
        try:
            mask = orjson.loads(mask)
        except orjson.JSONDecodeError:
            return None, [_NO_MASK]
    if mask is None or mask == []:
        return mask, []
    if isinstance(mask, Mapping):
        code = run_length_code(mask, height, width)
        return code, [_NO_MASK] if code is None else problems
    if not isinstance(mask, list):
        return None, [_NO_MASK]
    polygons = _polygons(mask)
    if polygons is not mask and not problems:
        problems.append(_ANOTHER_FORM)
    usable = [polygon for polygon in polygons if is_polygon(polygon)]
    if not usable:
        return None, [_NO_MASK]
    if len(usable) < len(polygons):
        problems.append(_NO_POLYGON)
    for number, polygon in enumerate(usable):
        if not is_near(polygon, height, width):
            problems.append(_FAR_POLYGON)
            usable[number] = _cut_off(polygon, height, width)
    return usable, problems


def _polygons(mask: list[Any]) -> list[Any]:
    """Polygons in COCO's form, of a list of numbers, of points, or of lists of points; else the list."""
    if all(map(_is_number, mask)):
        return [mask]
    if all(map(_is_point, mask)):
        return [_flat(mask)]
    if all(isinstance(polygon, list) and polygon and all(map(_is_point, polygon)) for polygon in mask):
        return list(map(_flat, mask))
    return mask


def _flat(points: list[Any]) -> list[Any]:
    """[x, y, x, y, ...] of points."""
    return [number for point in points for number in point]


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _is_point(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_number, value))


def _cut_off(polygon: list[float], height: int, width: int) -> list[float]:
    """The polygon with points that lie more than one image away moved to that distance."""
    sides = itertools.cycle((width, height))
    return [min(max(value, -side), 2 * side) for value, side in zip(polygon, sides, strict=False)]


def _ellipse(x: float, y: float, width: float, height: float) -> list[float]:
    """The polygon of 32 points that touches the sides of a box."""
    polygon = list[float]()
    for corner in range(32):
        angle = 2 * math.pi * corner / 32
        right = width * (1 + math.cos(angle)) / 2
        down = height * (1 + math.sin(angle)) / 2
        polygon += [round(x + right, 2), round(y + down, 2)]
    return polygon


def _extent(segmentation: Any) -> Corners | None:
    """The corners of a mask; None for an empty one."""
    if isinstance(segmentation, Mapping):
        x, y, width, height = map(float, coco_mask.toBbox(dict(segmentation)))
        if width == 0 or height == 0:
            return None
        return x, y, x + width, y + height
    return extent_of(segmentation)
