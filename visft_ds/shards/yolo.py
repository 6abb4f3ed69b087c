"""YOLO data sets -> COCO's lists: a data.yaml, images, and for each image a text file of boxes or polygons.

A line is `class x y width height` (the centre of a box) or `class x1 y1 x2 y2 x3 y3 ...` (a polygon), in
fractions of the picture as it is shown; an image without a file has no objects
(https://docs.ultralytics.com/datasets). The label of an image is where the last folder `images` of its path
is called `labels`, or beside it.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from visft_ds.files import checked_name, read_bytes, reading
from visft_ds.shards.common import (
    CLASSES,
    IMAGE_SUFFIXES,
    SPLITS,
    Exif,
    Findings,
    FolderSplit,
    Json,
    box_object,
    extent_of,
    lines_of,
    listed_image,
    name_here,
    polygon_object,
    read_lines,
)
from visft_ds.tasks.classes import COCO_NAMES

_MAX_YAML_BYTES = 1 << 20
_ROUNDING = 1e-4  # coordinates with few decimals pass 0 and 1 by so much
_BOX = 5  # values of a line


class _Loader(yaml.BaseLoader):
    """All scalars are text; no aliases, which a few lines multiply to gigabytes, and no key twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise ValueError("aliases (*name) are not allowed")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        counts = Counter(str(key.value) for key, _ in node.value)
        for key, times in counts.items():
            if times > 1:
                raise ValueError(f"the key {key!r:.40} occurs twice")
        return super().construct_mapping(node, deep)


@dataclass(frozen=True)
class _DataSet:
    """Content of a data.yaml."""

    path: Path
    roots: Sequence[Path]  #: folders that its paths are relative to; the last is its own
    names: Mapping[int, str]  #: of the classes
    keypoint_values: int  #: behind each box
    images: Mapping[str, Sequence[Path]]  #: split -> folders or lists of images
    missing: Findings  #: splits that are not there


def read_yolo(path: Path, only: str | None = None, exif: Exif = None) -> list[FolderSplit]:
    """The splits of a data.yaml, or of a classes.txt beside images/ and labels/, or `only` the one of this
    name; findings are labels without an image.

    Raises:
        ValueError: no data.yaml; images that are missing, or outside its folder; no label for any image of a
            split; a wrong line in a label; more than a tenth of labels without an image.
    """
    if path.name == CLASSES:
        with reading(path, "a list of classes, one name per line"):
            data = _read_classes(path, only)
    else:
        with reading(path, "a data.yaml of YOLO"):
            data = _read_description(path, only)
    splits = [_read_split(data, split, exif) for split in data.images]
    if splits:
        splits[0].findings.update(data.missing)
    return splits


def _read_description(path: Path, only: str | None) -> _DataSet:
    values = yaml.load(read_bytes(path, _MAX_YAML_BYTES), Loader=_Loader)
    if not isinstance(values, dict):
        raise ValueError("it must hold keys with values, such as `names: [cat, dog]`")
    folder = Path(os.path.abspath(path.parent))
    roots = [folder]
    root = _joined(folder, values.get("path", ""))
    if root.is_dir() and root != folder:
        _check_inside(root, folder, "path")
        roots.insert(0, root)
    if not any(map(values.get, SPLITS)):
        raise ValueError("it names no images: state `train: FOLDER` and `val: FOLDER`")
    images = dict[str, list[Path]]()
    missing = Findings()
    for key, split in SPLITS.items():
        entries = values.get(key)
        if not entries or only not in (None, split):
            continue
        if split in images:
            raise ValueError(f"it names images of {split!r} twice, again as {key!r}")
        if not isinstance(entries, list):
            entries = [entries]
        try:
            images[split] = [_find(entry, roots, key) for entry in entries]
        except FileNotFoundError:
            if split == "train" or only is not None:
                raise
            missing.add("split whose images are missing (not built)", f"{key}: {values[key]}")
    if missing and not images:
        raise ValueError(f"{'; '.join(lines_of(missing)).strip()}; it names no other split")
    count, size = values.get("kpt_shape") or (0, 0)
    return _DataSet(
        path=path,
        roots=roots,
        names=_names(values),
        keypoint_values=int(count) * int(size),
        images=images,
        missing=missing,
    )


def _read_classes(path: Path, only: str | None) -> _DataSet:
    """A data set without a data.yaml, as Label Studio exports it: each line names a class."""
    names = read_lines(path)
    folder = path.parent / "images"
    images = dict[str, list[Path]]()
    for name, split in SPLITS.items():
        if (folder / name).is_dir():
            images.setdefault(split, []).append(folder / name)
    if not images:
        images = {"train": [folder]}
    return _DataSet(
        path=path,
        roots=[path.parent],
        names=_names({"names": [name.strip() for name in names]}),
        keypoint_values=0,
        images={split: folders for split, folders in images.items() if only in (None, split)},
        missing=Findings(),
    )


def _read_split(data: _DataSet, split: str, exif: Exif) -> FolderSplit:
    where = f"{data.path}: {split}"
    sources = data.images[split]
    files = set[Path]()
    for source in sources:
        files.update(_image_files(source, data.roots))
    label_of = {file: _label_of(file) for file in files}
    labels = {label for label in label_of.values() if label.is_file()}
    if not files:
        listed = ", ".join(map(str, sources))
        raise ValueError(f"{where}: there is no image in {listed}: export the data set with its images")
    if not labels:
        looked = f"looked for {label_of[min(files)]} and the like"
        remedy = "--split NAME makes only another split"
        raise ValueError(f"{where}: none of its {len(files)} images has a label ({looked}); {remedy}")
    ids = _category_ids(data.names)
    categories = [{"id": ids[number], "name": data.names[number]} for number in data.names]
    folder = Path(os.path.commonpath([file.parent for file in files]))
    images = list[Json]()
    annotations = list[Json]()
    for number, file in enumerate(sorted(files), 1):
        name = checked_name(str(file.relative_to(folder)), where)
        image = listed_image(folder, name, number, exif)
        images.append(image)
        if label_of[file] not in labels:
            continue
        for class_number, values in _objects(label_of[file], data):
            if image["height"] == image["width"] == 1:
                continue  # it will be left out with the reason, which its boxes would hide
            annotation = {"id": len(annotations) + 1, "image_id": number}
            annotation |= _placed(values, image["height"], image["width"])
            annotations.append(annotation | {"category_id": ids[class_number], "iscrowd": 0})
    findings = Findings()
    if all(source.is_dir() for source in sources):
        _find_unused(labels, findings, where)
    content = {"images": images, "annotations": annotations, "categories": categories}
    return FolderSplit(split, folder, instances=content, findings=findings)


def _find_unused(labels: set[Path], findings: Findings, where: str) -> None:
    """Note labels without an image. Raises ValueError if they are more than a tenth."""
    unused = set[Path]()
    for folder in {label.parent for label in labels}:
        if "labels" in folder.parts:
            unused.update(folder.glob("*.txt"))
    unused -= labels
    for label in sorted(unused):
        if label.name != CLASSES:  # annotation tools leave it
            findings.add("label without image", label)
    findings.refuse_above_a_tenth(len(unused) + len(labels), where, "labels")


def _joined(folder: Path, name: str) -> Path:
    """The path of a name in a folder, in which `..` is resolved by the words alone."""
    return Path(os.path.normpath(folder / name))


def _check_inside(path: Path, folder: Path, key: str) -> None:
    """Raise ValueError for a path outside the folder of the data.yaml, which a stranger may have written."""
    if not path.is_relative_to(folder):
        remedy = "copy the data.yaml to a folder above all images, and give its path there"
        raise ValueError(
            f"{key}: {path} is outside its folder {folder}, and only images below that are read: {remedy}"
        )


def _names(values: Mapping[str, Any]) -> dict[int, str]:
    """The names of the classes by their numbers."""
    listed = values["names"]
    pairs = listed.items() if isinstance(listed, dict) else enumerate(listed)
    names = {int(number): name for number, name in pairs}
    complete = names and all(names.values()) and len(names) == len(listed)
    if isinstance(listed, str) or not complete or min(names) < 0:
        raise ValueError("names must be a list of names, or number: name")
    "".join(names.values()).encode()  # fails for what is no text, and for half a character of an escape
    count = values.get("nc")
    if count and int(count) != len(names):
        raise ValueError(f"nc is {count:.40}, but there are {len(names)} names")
    return names


def _category_ids(names: Mapping[int, str]) -> dict[int, int]:
    """Class number -> category id: the same, but COCO's own for COCO's names, as heads know them by these."""
    numbers = sorted(names)
    is_coco = [names[number] for number in numbers] == list(COCO_NAMES.values())
    return dict(zip(numbers, COCO_NAMES if is_coco else numbers, strict=True))


def _find(entry: str, roots: Sequence[Path], key: str) -> Path:
    """The folder or list of images that an entry means, below the last of the roots."""
    names = [entry]
    if entry.startswith("../"):  # exports of Roboflow write "../train/images" for one beside the data.yaml
        names.insert(0, entry[3:])
    candidates = [_joined(root, name) for name in names for root in roots]
    for root in roots:
        name = name_here(root, entry)
        if name is not None:
            candidates.append(root / name)
    for path in candidates:
        if path.exists():
            _check_inside(path, roots[-1], key)
            return path
    shown = ", ".join(dict.fromkeys(map(str, candidates)))
    raise FileNotFoundError(
        f"{key}: {entry!r} does not exist; looked for {shown} (--split NAME makes only one split)"
    )


def _image_files(source: Path, roots: Sequence[Path]) -> Iterator[Path]:
    """The images in a folder, links to folders not followed, or in a text file that lists them."""
    if source.is_dir():
        for path in source.rglob("*"):
            if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file():
                yield path
    elif source.suffix.lower() in IMAGE_SUFFIXES:
        yield source
    else:
        for number, line in enumerate(_lines_of(source), 1):
            name = line.strip()
            if not name:
                continue
            folders = (source.parent, *roots)
            path = _joined(source.parent, name)
            for folder in folders:
                named_here = name_here(folder, name)
                if named_here is not None:
                    path = folder / named_here
                    break
            if not any(map(path.is_relative_to, folders)):
                raise ValueError(f"{source} line {number}: {name!r:.200} leaves the data set's folder")
            yield path


def _label_of(image: Path) -> Path:
    """Path of an image's label: the first of the two places that has one, or the place in `labels`."""
    beside = image.with_suffix(".txt")
    in_labels = Path("/labels/".join(str(beside).rsplit("/images/", 1)))
    return beside if beside.is_file() and not in_labels.is_file() else in_labels


def _lines_of(path: Path) -> list[str]:
    with reading(path, "a text file"):
        return read_lines(path)


def _objects(path: Path, data: _DataSet) -> Iterator[tuple[int, list[float]]]:
    """(class, coordinates) of each line of a label: those of a box or of the corners of a polygon."""
    for number, line in enumerate(_lines_of(path), 1):
        words = line.split()
        if words:
            try:
                yield _parse(words, data)
            except ValueError as error:
                raise ValueError(f"{path} line {number}: {error}") from error


def _parse(words: Sequence[str], data: _DataSet) -> tuple[int, list[float]]:
    class_number, *values = map(float, words)
    if class_number not in data.names:
        known = f"{min(data.names)} to {max(data.names)}"
        raise ValueError(f"class {words[0]:.40}, but the names are those of {known}")
    length = len(words)
    if data.keypoint_values:
        allowed = f"one with keypoints {_BOX + data.keypoint_values}"
        fits = length in (_BOX, _BOX + data.keypoint_values)
        values = values[:4]
    else:
        allowed = "a polygon 7, 9, 11 or more"
        fits = length >= _BOX and length % 2 == 1
    if not fits:
        raise ValueError(f"{length} values; a box has {_BOX}, {allowed}")
    for value in values:
        if not -_ROUNDING <= value <= 1 + _ROUNDING:
            raise ValueError(f"{value:g} is outside of [0, 1]: coordinates are fractions of width and height")
    return int(class_number), values


def _placed(values: Sequence[float], height: int, width: int) -> Json:
    """Box, area and polygon of an object as COCO has them, in pixels."""
    is_box = len(values) == 4
    if is_box:
        x, y, across, down = values
        values = [x - across / 2, y - down / 2, x + across / 2, y + down / 2]
    sides = itertools.cycle((width, height))
    polygon = [round(value * side, 3) for value, side in zip(values, sides, strict=False)]
    if not is_box:
        return polygon_object([polygon])
    left, top, right, bottom = extent_of([polygon])
    return box_object(left, top, right - left, bottom - top)
