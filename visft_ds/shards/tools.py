"""Annotation files of one image each -> COCO's lists: Pascal VOC's XML (boxes), labelme's JSON (polygons).

A file is that of the image of its name: beside it, or in `JPEGImages` or `images` where the file is in
`annotations`. The split is a folder of their paths, else that of `ImageSets/Main` which lists the name, else
`train`. Images without a file are left out: a tool writes none for what nobody has annotated yet.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from visft_ds.files import checked_name, read_bytes, reading
from visft_ds.shards.common import (
    IMAGE_SUFFIXES,
    SPLITS,
    Exif,
    Findings,
    FolderSplit,
    Json,
    box_object,
    extent_of,
    json_of,
    listed_image,
    polygon_object,
    read_lines,
)

VOC = "Pascal VOC"
LABELME = "labelme"
_SUFFIXES = {VOC: ".xml", LABELME: ".json"}
_DEPTHS = ("*", "*/*", "*/*/*")  # of files below the data set's folder
_CORNERS = ("xmin", "ymin", "xmax", "ymax")


@dataclass(frozen=True)
class _Annotated:
    """An image with what its annotation file says."""

    image: Path
    height: int  #: 0 if it is not stated
    width: int
    objects: Sequence[tuple[str, Json]]  #: class name, and the object as COCO has it


def tool_layouts(folder: Path) -> Iterator[tuple[str, list[Path]]]:
    """(layout, its annotation files) of each layout of this module that a folder has."""
    for layout in _SUFFIXES:
        image_of, _, _ = _find_files(layout, folder)
        if image_of:
            yield layout, list(image_of)


def _find_files(layout: str, folder: Path) -> tuple[dict[Path, Path], list[Path], list[Path]]:
    """(annotation file of a layout -> its image, all files of its suffix, all images) in a folder."""
    images = dict[Path, Path]()  # path without suffix -> image
    annotations = list[Path]()
    for pattern in _DEPTHS:
        for path in sorted(folder.glob(pattern)):
            suffix = path.suffix.lower()
            if suffix in IMAGE_SUFFIXES:
                images[path.with_suffix("")] = path
            elif suffix == _SUFFIXES[layout]:
                annotations.append(path)
    image_of = dict[Path, Path]()
    for path in annotations:
        for candidate in _places_of_image(path, folder):
            if candidate in images:
                image_of[path] = images[candidate]
                break
    return image_of, annotations, list(images.values())


def _places_of_image(path: Path, folder: Path) -> Iterator[Path]:
    """Paths, without suffix, where the image of an annotation file may be."""
    stem = path.with_suffix("")
    yield stem
    first, *others = stem.relative_to(folder).parts
    if first.lower() == "annotations":
        for images in ("JPEGImages", "images"):
            yield folder.joinpath(images, *others)


def read_tool(layout: str, folder: Path, only: str | None = None, exif: Exif = None) -> list[FolderSplit]:
    """The splits of a folder of annotation files, or `only` the one of this name.

    All files are read for the list of classes, which is that of all splits: ids from 0 in the order of names.

    Raises:
        ValueError: a file of another form; more than a tenth of the files without their image; an image in
            two splits.
    """
    image_of, annotations, images = _find_files(layout, folder)
    findings = Findings()
    unpaired = _others_beside(image_of, annotations)
    for path in unpaired:
        findings.add(f"{_SUFFIXES[layout]} file without image", path.relative_to(folder))
    findings.refuse_above_a_tenth(len(image_of) + len(unpaired), folder, "annotation files")
    for path in _others_beside(image_of.values(), images):
        findings.add("image without annotation file (left out)", path.relative_to(folder))
    listed = _listed_splits(folder) if layout == VOC else {}
    splits = dict[str, list[_Annotated]]()
    names = set[str]()
    for path, image in image_of.items():
        with reading(path, f"a file of {layout}"):
            data = read_bytes(path)
            annotated = _parse_voc(data, image) if layout == VOC else _parse_labelme(data, image, findings)
        names.update(name for name, _ in annotated.objects)
        split = _split_of(image.relative_to(folder), path.relative_to(folder), listed)
        if split is None:
            findings.add("image in none of the lists ImageSets/Main (left out)", image.name)
        else:
            splits.setdefault(split, []).append(annotated)
    ids = {name: number for number, name in enumerate(sorted(names))}
    result = list[FolderSplit]()
    for split, annotated_images in splits.items():
        if only in (None, split):
            result.append(_folder_split(split, annotated_images, ids, exif))
    if result:
        result[0].findings.update(findings)
    return result


def _others_beside(used: Collection[Path], paths: Sequence[Path]) -> list[Path]:
    """Those of the paths that are in a folder of one that is used, and are not."""
    own = set(used)
    folders = {path.parent for path in own}
    return [path for path in paths if path.parent in folders and path not in own]


def _listed_splits(folder: Path) -> dict[str, str]:
    """Name of an image without suffix -> its split, by Pascal VOC's lists."""
    splits = dict[str, str]()
    for name, split in SPLITS.items():
        path = folder / f"ImageSets/Main/{name}.txt"
        if not path.is_file():
            continue
        with reading(path, "a list of image names"):
            lines = read_lines(path)
        for line in lines:
            image = line.strip()
            if splits.setdefault(image, split) != split:
                raise ValueError(f"{path}: {image:.80} is in the list of {splits[image]!r}, too")
    return splits


def _split_of(image: Path, annotation: Path, listed: Mapping[str, str]) -> str | None:
    """The split of an image by the folders of both paths, or by its list; None if it is in no list."""
    for part in (*image.parent.parts, *annotation.parent.parts):
        if part.lower() in SPLITS:
            return SPLITS[part.lower()]
    return listed.get(image.stem) if listed else "train"


def _parse_voc(data: bytes, image: Path) -> _Annotated:
    text = data.decode("utf-8-sig")
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise ValueError("document types and entities, which a few lines multiply, are not allowed")
    root = ElementTree.fromstring(text)
    if root.tag != "annotation":
        raise ValueError(f"it begins with <{root.tag:.40}>, not with <annotation>")
    objects = list[tuple[str, Json]]()
    for entry in root.findall("object"):
        name = entry.findtext("name", "").strip()
        texts = [entry.findtext(f"bndbox/{corner}") for corner in _CORNERS]
        corners = [float(text) for text in texts if text is not None]
        if not name or len(corners) < len(_CORNERS):
            raise ValueError(f"an object needs a name and a bndbox of {', '.join(_CORNERS)}")
        left, top, right, bottom = corners
        objects.append((name, box_object(left, top, right - left, bottom - top)))
    height = float(root.findtext("size/height", "0"))
    width = float(root.findtext("size/width", "0"))
    return _Annotated(image, int(height), int(width), objects)


def _parse_labelme(data: bytes, image: Path, findings: Findings) -> _Annotated:
    content = json_of(data)
    if not isinstance(content, dict) or "shapes" not in content:
        raise ValueError("it has no shapes")
    objects = list[tuple[str, Json]]()
    polygons_of = dict[tuple[str, object], list[list[float]]]()
    for number, shape in enumerate(content["shapes"]):
        name = shape["label"]
        if not isinstance(name, str) or not name.strip():
            raise ValueError("a shape has no label")
        kind = shape.get("shape_type", "polygon")
        polygon = [float(value) for x, y in shape["points"] for value in (x, y)]
        if kind == "rectangle":
            left, top, right, bottom = extent_of([polygon])
            objects.append((name, box_object(left, top, right - left, bottom - top)))
        elif kind == "polygon":
            group = shape.get("group_id")  # of the pieces of one object
            if group is None:
                group = f"shape {number}"
            polygons_of.setdefault((name, group), []).append(polygon)
        else:
            findings.add(f"labelme shape of type {kind!r:.20} (left out)", image.name)
    for (name, _), polygons in polygons_of.items():
        objects.append((name, polygon_object(polygons)))
    height = content.get("imageHeight") or 0
    width = content.get("imageWidth") or 0
    return _Annotated(image, height, width, objects)


def _folder_split(
    split: str, annotated: Sequence[_Annotated], ids: Mapping[str, int], exif: Exif
) -> FolderSplit:
    folder = Path(os.path.commonpath([entry.image.parent for entry in annotated]))
    images = list[Json]()
    annotations = list[Json]()
    for number, entry in enumerate(annotated, 1):
        name = checked_name(str(entry.image.relative_to(folder)), folder)
        if entry.height and entry.width:
            image = {"id": number, "file_name": name, "height": entry.height, "width": entry.width}
        else:
            image = listed_image(folder, name, number, exif)
        images.append(image)
        for class_name, content in entry.objects:
            annotation = {"id": len(annotations) + 1, "image_id": number}
            annotations.append({**annotation, "category_id": ids[class_name], "iscrowd": 0, **content})
    categories = [{"id": number, "name": name} for name, number in ids.items()]
    content = {"images": images, "annotations": annotations, "categories": categories}
    return FolderSplit(split, folder, instances=content)
