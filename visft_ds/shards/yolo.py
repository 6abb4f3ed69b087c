"""YOLO data sets -> COCO's lists: a data.yaml, images, and for each image a text file of boxes or polygons.

A line is `class x y width height` (the centre of a box) or `class x1 y1 x2 y2 x3 y3 ...` (a polygon), in
fractions of the picture as it is shown; an image without a file has no objects
(https://docs.ultralytics.com/datasets). The label of an image is where the last folder `images` of its path
is called `labels`, or beside it.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from visft_ds.files import checked_name, image_frame, read_bytes, reading
from visft_ds.shards.coco import Findings, FolderSplit, lines_of
from visft_ds.tasks.classes import COCO_NAMES

#: Name of a split in a data set -> its name among the shards.
SPLITS: Mapping[str, str] = {
    "train": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}
#: Whether pictures are turned as their EXIF data says; None: unless only the stored size fits the
#: annotations.
Exif = Literal["apply", "ignore"] | None
SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"))
_MOST_OF_A_DESCRIPTION, _MOST_OF_A_TEXT = 1 << 20, 1 << 28  # bytes
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
        if doubled := [key for key, times in counts.items() if times > 1]:
            raise ValueError(f"the key {doubled[0]!r:.40} occurs twice")
        return super().construct_mapping(node, deep)


def read_yolo(path: Path, wanted: str | None = None, exif: Exif = None) -> list[FolderSplit]:
    """The splits in a data.yaml, or the split `wanted` alone; what is odd are labels without an image.

    Raises:
        ValueError: no data.yaml; images that are missing, or outside its folder; no label for any image of a
        split; a
            wrong line in a label; more than a tenth of labels without an image.
    """
    with reading(path, "a data.yaml of YOLO"):
        values = yaml.load(read_bytes(path, _MOST_OF_A_DESCRIPTION), Loader=_Loader)  # all scalars are text
        if not isinstance(values, dict):
            raise ValueError("it must hold keys with values, such as `names: [cat, dog]`")
        here = Path(os.path.abspath(path.parent))
        root = Path(os.path.normpath(here / values.get("path", "")))
        roots: tuple[Path, ...] = (here,)
        if root.is_dir() and root != here:
            _check_inside(root, here, "path")
            roots = (root, here)
        found: dict[str, list[Path]] = {}
        missing = Findings()
        for key, split in SPLITS.items():
            if values.get(key) and wanted in (None, split):
                if split in found:
                    raise ValueError(f"it names images of {split!r} twice, again as {key!r}")
                entries = values[key] if isinstance(values[key], list) else [values[key]]
                try:
                    found[split] = [_find(entry, roots, key) for entry in entries]
                except _NotThereError:
                    if split == "train" or wanted is not None:
                        raise
                    missing.add("split whose images are missing (not built)", f"{key}: {values[key]}")
        if not any(map(values.get, SPLITS)):
            raise ValueError("it names no images: state `train: FOLDER` and `val: FOLDER`")
        if missing and not found:
            raise ValueError(f"{'; '.join(lines_of(missing)).strip()}; it names no other split")
        names, (count, size) = _names(values), values.get("kpt_shape") or (0, 0)
        keypoints = int(count) * int(size)
    ids = {number: number for number in names}
    if [names[number] for number in sorted(ids)] == list(COCO_NAMES.values()):
        ids = dict(zip(sorted(ids), COCO_NAMES, strict=True))  # heads know COCO's classes by COCO's own
    categories = [{"id": ids[number], "name": name} for number, name in names.items()]
    made = list[FolderSplit]()
    for split, places in found.items():
        where, odd = f"{path}: {split}", Findings()
        paths = sorted({file for place in places for file in _image_files(place, roots)})
        labels = {file: _label_of(file) for file in paths}
        used = {label for label in labels.values() if label.is_file()}
        if not used:
            looked = f" (looked for {labels[paths[0]]} and the like)" if paths else ""
            told = (
                f"none of its {len(paths)} images has a label{looked}; --split NAME makes only another split"
            )
            raise ValueError(f"{where}: {told}")
        folder = Path(os.path.commonpath([file.parent for file in paths]))
        images, annotations = list[dict[str, Any]](), list[dict[str, Any]]()
        for number, file in enumerate(paths, 1):
            name = checked_name(str(file.relative_to(folder)), where)
            images.append(listed_image(folder, name, number, exif))
            height, width = images[-1]["height"], images[-1]["width"]
            for category, points, outline in (
                _lines(labels[file], names, keypoints) if labels[file] in used else ()
            ):
                if (height, width) != (
                    1,
                    1,
                ):  # it will be left out with the reason, which its boxes would hide
                    entry = {**_placed(points, outline, height, width), "category_id": ids[category]}
                    annotations.append(
                        {"id": len(annotations) + 1, "image_id": number, **entry, "iscrowd": 0}
                    )
        beside = {
            file for label in used for file in label.parent.glob("*.txt") if "labels" in label.parts
        } - used
        for label in sorted(beside) if all(place.is_dir() for place in places) else ():
            if label.name != "classes.txt":  # annotation tools leave it
                odd.add("label without image", label)
        odd.refuse_above_a_tenth(len(beside) + len(used), where, "labels")
        if not made:
            odd.update(missing)
        content = {"images": images, "annotations": annotations, "categories": categories}
        made.append(FolderSplit(split, folder, content, None, odd=odd))
    return made


class _NotThereError(ValueError):
    """Images that a data.yaml names do not exist."""


def _check_inside(path: Path, here: Path, key: str) -> None:
    """Raise ValueError for a path outside the folder of the data.yaml, which a stranger may have written."""
    if not path.is_relative_to(here):
        remedy = "copy the data.yaml to a folder above all images, and give its path there"
        raise ValueError(
            f"{key}: {path} is outside its folder {here}, and only images below that are read: {remedy}"
        )


def _names(values: Mapping[str, Any]) -> dict[int, str]:
    given = values["names"]
    names = {int(key): name for key, name in (given.items() if isinstance(given, dict) else enumerate(given))}
    if (
        isinstance(given, str)
        or not names
        or len(names) < len(given)
        or min(names) < 0
        or not all(names.values())
    ):
        raise ValueError("names must be a list of names, or number: name")
    "".join(names.values()).encode()  # fails for what is no text, and for half a character of an escape
    if values.get("nc") and int(values["nc"]) != len(names):
        raise ValueError(f"nc is {values['nc']:.40}, but there are {len(names)} names")
    return names


def _find(entry: str, roots: Sequence[Path], key: str) -> Path:
    """The folder or list of images that an entry means, below the last of the roots. Exports of Roboflow
    write "../train/images" for one beside the data.yaml."""
    names = [entry[3:], entry] if entry.startswith("../") else [entry]
    tried = [Path(os.path.normpath(root / name)) for name in names for root in roots]
    if found := [place for place in tried if place.exists()]:
        _check_inside(found[0], roots[-1], key)
        return found[0]
    shown = ", ".join(dict.fromkeys(map(str, tried)))
    raise _NotThereError(
        f"{key}: {entry!r} does not exist; looked for {shown} (--split NAME makes only one split)"
    )


def listed_image(folder: Path, name: str, number: int, exif: Exif) -> dict[str, Any]:
    """An image as COCO lists it; one that cannot be read, which a build leaves out, is of 1 x 1 pixels."""
    try:
        frame = image_frame(folder / name)
        height, width = (frame.height, frame.width) if exif == "ignore" else frame.upright
    except (ValueError, OSError):
        height, width = 1, 1
    return {"id": number, "file_name": name, "height": height, "width": width}


def _image_files(place: Path, roots: Sequence[Path]) -> Iterator[Path]:
    """The images in a folder, links to folders not followed, or in a text file that lists them."""
    if place.is_dir():
        yield from (path for path in place.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    elif place.suffix.lower() in SUFFIXES:
        yield place
    else:
        for number, line in enumerate(map(str.strip, _text_of(place).splitlines()), 1):
            path = Path(os.path.normpath(place.parent / line))
            if not any(path.is_relative_to(root) for root in (*roots, place.parent)):
                raise ValueError(f"{place} line {number}: {line!r:.200} leaves the data set's folder")
            if line:
                yield path


def _label_of(image: Path) -> Path:
    """Path of an image's label: the first of the two places that has one, or the place in `labels`."""
    beside = image.with_suffix(".txt")
    in_labels = Path("/labels/".join(str(beside).rsplit("/images/", 1)))
    return beside if beside.is_file() and not in_labels.is_file() else in_labels


def _text_of(path: Path) -> str:
    with reading(path, "a text file"):
        return read_bytes(path, _MOST_OF_A_TEXT).decode("utf-8-sig")


def _lines(
    path: Path, names: Mapping[int, str], keypoints: int
) -> Iterator[tuple[int, Sequence[float], bool]]:
    """(class, x y x y ... of a polygon or of two corners, whether it is a polygon) of each line of a
    label.
    """
    for place, words in enumerate(map(str.split, _text_of(path).splitlines()), 1):
        if not words:
            continue
        try:
            number, *values = map(float, words)
            if number not in names:
                raise ValueError(
                    f"class {words[0]:.40}, but the names are those of {min(names)} to {max(names)}"
                )
            if keypoints and len(words) == _BOX + keypoints:
                values = values[:4]
            elif len(words) != _BOX and (keypoints or len(words) < _BOX or len(words) % 2 == 0):
                other = (
                    f"one with keypoints {_BOX + keypoints}" if keypoints else "a polygon 7, 9, 11 or more"
                )
                raise ValueError(f"{len(words)} values; a box has {_BOX}, {other}")
            if wrong := [value for value in values if not -_ROUNDING <= value <= 1 + _ROUNDING]:
                raise ValueError(
                    f"{wrong[0]:g} is outside of [0, 1]: coordinates are fractions of width and height"
                )
        except ValueError as error:
            raise ValueError(f"{path} line {place}: {error}") from error
        if len(values) > 4:
            yield int(number), values, True
        else:
            x, y, width, height = values
            yield int(number), (x - width / 2, y - height / 2, x + width / 2, y + height / 2), False


def _placed(given: Sequence[float], outline: bool, height: int, width: int) -> dict[str, Any]:
    """Box, area and polygon of a line as COCO has them, in pixels."""
    points = [
        (round(x * width, 3), round(y * height, 3)) for x, y in zip(given[::2], given[1::2], strict=True)
    ]
    xs, ys = zip(*points, strict=True)
    left, top, right, bottom = min(xs), min(ys), max(xs), max(ys)
    box = [left, top, round(right - left, 3), round(bottom - top, 3)]
    if not outline:
        return {"bbox": box, "area": round((right - left) * (bottom - top), 3)}
    turned = zip(points, [*points[1:], points[0]], strict=True)
    area = round(abs(sum(x1 * y2 - x2 * y1 for (x1, y1), (x2, y2) in turned)) / 2, 3)
    return {"bbox": box, "area": area, "segmentation": [[value for point in points for value in point]]}
