"""YOLO data sets -> COCO's lists: a data.yaml, images, and for each image a text file of boxes or polygons.

A line is `class x y width height` (the centre of a box) or `class x1 y1 x2 y2 x3 y3 ...` (a polygon), in fractions of
the picture; an image without a file has no objects (https://docs.ultralytics.com/datasets). The label of an image is
where the last folder `images` of its path is called `labels`, or beside it.

Such labels fit the picture as it is shown, after EXIF rotation, as the readers of the format turn it; shards keep the
pixels as they are stored, so that points are turned back.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import yaml

from visft_ds.names import shown_name
from visft_ds.shards.images import stored_frame
from visft_ds.shards.inputs import MadeJson, read_bounded
from visft_ds.tasks.classes import COCO_NAMES

#: Name of a split in a data set -> its name among the shards.
SPLITS: Mapping[str, str] = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_MOST_OF_A_DESCRIPTION, _MOST_OF_A_LABEL = 1 << 20, 1 << 23  # bytes
_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"))
_NO_LABELS = frozenset(("classes.txt",))  # what annotation tools leave beside them
_ROUNDING = 1e-4  # coordinates with few decimals pass 0 and 1 by so much
_BOX = 5  # values of a line
_SHOWN, _MOST_WRONG = 5, 1000  # wrong lines in a message, and before reading ends
#: EXIF orientation -> the point of the stored picture that is shown at (x, y).
_STORED: Mapping[int, Callable[[float, float], tuple[float, float]]] = {
    1: lambda x, y: (x, y),
    2: lambda x, y: (1 - x, y),
    3: lambda x, y: (1 - x, 1 - y),
    4: lambda x, y: (x, 1 - y),
    5: lambda x, y: (y, x),
    6: lambda x, y: (y, 1 - x),
    7: lambda x, y: (1 - y, 1 - x),
    8: lambda x, y: (1 - y, x),
}


@dataclass(frozen=True)
class YoloDescription:
    """Content of a data.yaml."""

    path: Path
    names: Mapping[int, str]  #: number of a class -> its name
    images: Mapping[str, tuple[Path, ...]]  #: split -> folders of images, or files that list them
    keypoints: int = 0  #: values of keypoints behind the box in every line


def read_description(path: Path, wanted: str | None = None) -> YoloDescription:
    """Read a data.yaml; every value in it counts as text.

    Args:
        wanted: only the split of this name is looked for.

    Raises:
        ValueError: no YAML, no names, names that contradict `nc`, or images that are nowhere; names the file.
    """
    values = read_mapping(path)
    names = _names(values, path)
    here = Path(os.path.abspath(path.parent))
    root = here / _text(values, "path", path)
    roots = [root, here] if os.path.isdir(root) else [here]
    named = [key for key in SPLITS if values.get(key)]
    if not named:
        raise ValueError(f"{path} names no images: state `train: FOLDER` and `val: FOLDER`")
    images: dict[str, tuple[Path, ...]] = {}
    for key in (key for key in named if wanted in (None, SPLITS[key])):
        entries = values[key] if isinstance(values[key], list) else [values[key]]
        if not all(isinstance(entry, str) and entry and "\0" not in entry for entry in entries):
            raise ValueError(f"{path}: {key} must be a folder of images, or a list of such")
        if SPLITS[key] in images:
            raise ValueError(f"{path} names images of {SPLITS[key]!r} twice, the second time as {key!r}: leave one out")
        images[SPLITS[key]] = tuple(_find(entry, roots, f"{path}: {key}") for entry in entries)
    return YoloDescription(path, names, images, _keypoints(values, path))


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, all of whose scalars are text: nothing is built, and no key is merged.

    Raises:
        ValueError: another content; names the file.
    """
    data = read_bounded(path, _MOST_OF_A_DESCRIPTION)
    try:
        values = yaml.load(data, Loader=yaml.BaseLoader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold keys with values, such as `names: [cat, dog]`")
    return values


def _text(values: Mapping[str, Any], key: str, path: Path) -> str:
    value = values.get(key, "")
    if not isinstance(value, str) or "\0" in value:
        raise ValueError(f"{path}: {key} must be one text")
    return value


def _number(text: object, least: int) -> int | None:
    """The whole number that a text is, of at most nine digits; None for anything else, or one below `least`."""
    plain = isinstance(text, str) and len(text) < 10 and text.isascii() and text.isdigit()
    number = int(text) if plain and isinstance(text, str) else -1
    return number if number >= least else None


def _names(values: Mapping[str, Any], path: Path) -> dict[int, str]:
    given = values.get("names")
    pairs = list(given.items()) if isinstance(given, dict) else [*enumerate(given)] if isinstance(given, list) else []
    names: dict[int, str] = {}
    for key, name in pairs:
        number = key if isinstance(key, int) else _number(key, 0)
        if number is None or not isinstance(name, str) or not name or number in names:
            raise ValueError(
                f"{path}: names must be a list of names, or number: name, each number once; {key!s:.40}: {name!s:.40}"
            )
        names[number] = name
    if not names:
        raise ValueError(f"{path} has no names: state `names: [cat, dog]`, in the order of the classes in the labels")
    count = _text(values, "nc", path)
    if count and _number(count, 1) != len(names):
        raise ValueError(f"{path}: nc is {count:.40}, but there are {len(names)} names: correct one of them")
    return names


def _keypoints(values: Mapping[str, Any], path: Path) -> int:
    shape = values.get("kpt_shape")
    if not shape:
        return 0
    numbers = [_number(side, 1) for side in shape] if isinstance(shape, list) else []
    if len(numbers) != 2 or None in numbers:
        raise ValueError(f"{path}: kpt_shape must be two numbers, such as [17, 3]")
    return (numbers[0] or 0) * (numbers[1] or 0)


def _find(entry: str, roots: Sequence[Path], where: str) -> Path:
    """The folder or list of images that an entry means. Exports of Roboflow write "../train/images" for one beside
    the data.yaml."""
    names = [entry[3:], entry] if entry.startswith("../") else [entry]
    tried = [os.path.normpath(root / name) for name in names for root in roots]
    for place in tried:
        if os.path.exists(place):
            return Path(place)
    shown = ", ".join(dict.fromkeys(tried))
    raise ValueError(f"{where}: {entry!r} does not exist; looked for {shown} (--split NAME makes one split alone)")


def read_yolo(description: YoloDescription, split: str) -> tuple[Path, MadeJson]:
    """(folder of the images, their objects as a COCO file) of a split.

    Raises:
        ValueError: no image; no label for any of them; a file name that is no text; lines of labels that are wrong,
            the first few by file and line.
    """
    where = f"{description.path}: {split}"
    paths = sorted({path for place in description.images[split] for path in _image_files(place)})
    if not paths:
        shown = ", ".join(map(str, description.images[split]))
        raise ValueError(f"{where}: there is no image in {shown} ({', '.join(sorted(_SUFFIXES))})")
    labels = {path: _label_of(path) for path in paths}
    used = {label for label in labels.values() if os.path.isfile(label)}
    if not used:
        raise ValueError(
            f"{where}: none of its {len(paths)} images has a label, which is looked for at {labels[paths[0]]} and the "
            "like; put them there, or leave the split out (--split NAME makes one alone)"
        )
    ids = _category_ids(description.names)
    folder = Path(os.path.commonpath([path.parent for path in paths]))
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    wrong: list[str] = []
    for number, path in enumerate(paths, 1):
        if len(wrong) >= _MOST_WRONG:
            break
        name = str(path.relative_to(folder))
        if any(unicodedata.category(sign) == "Cs" for sign in name):  # bytes that the system could not decode
            raise ValueError(f"{where}: {shown_name(name)}: no UTF-8 name; rename it")
        height, width, orientation = stored_frame(path)
        images.append({"id": number, "file_name": name, "height": height, "width": width})
        for line in _lines(labels[path], description, wrong) if labels[path] in used else ():
            if (height, width) == (1, 1):
                continue  # it cannot be read and will be left out with the reason, which its boxes would hide
            entry = {**_placed(line, height, width, orientation), "category_id": ids[line.number], "image_id": number}
            annotations.append({"id": len(annotations) + 1, **entry, "iscrowd": 0})
    if wrong:
        more = f"\n  and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise ValueError(f"{where}: wrong lines in its labels: {len(wrong)}\n  " + "\n  ".join(wrong[:_SHOWN]) + more)
    categories = [{"id": ids[number], "name": name} for number, name in description.names.items()]
    content = {"images": images, "annotations": annotations, "categories": categories}
    findings = tuple(("label without image", shown_name(str(label))) for label in _without_image(labels.values(), used))
    return folder, MadeJson(f"{description.path.name} as COCO JSON", orjson.dumps(content), findings)


def _category_ids(names: Mapping[int, str]) -> dict[int, int]:
    """Number of a class -> its category id: COCO's own where the names are COCO's, which heads know by those."""
    if [names[number] for number in sorted(names)] == list(COCO_NAMES.values()):
        return dict(zip(sorted(names), COCO_NAMES, strict=True))
    return {number: number for number in names}


def _image_files(place: Path) -> Iterator[Path]:
    """The images in a folder, or in a text file that lists them."""
    if os.path.isdir(place):
        yield from (path for path in place.rglob("*") if path.suffix.lower() in _SUFFIXES and os.path.isfile(path))
    elif place.suffix.lower() in _SUFFIXES:
        yield place
    else:
        for line in _text_of(place).splitlines():
            if line.strip():
                yield Path(os.path.normpath(place.parent / line.strip()))


def _label_of(image: Path) -> Path:
    """Path of an image's label: the first of the two places that has one, or the place in `labels`."""
    beside = image.with_suffix(".txt")
    head, images, tail = str(beside).rpartition("/images/")
    in_labels = Path(f"{head}/labels/{tail}") if images else beside
    return beside if os.path.isfile(beside) and not os.path.isfile(in_labels) else in_labels


def _without_image(labels: Iterable[Path], used: set[Path]) -> Iterator[Path]:
    """Files among the labels that belong to no image of the split."""
    for folder in sorted({label.parent for label in labels if "labels" in label.parts}):
        for path in sorted(folder.glob("*.txt") if os.path.isdir(folder) else ()):
            if path not in used and path.name not in _NO_LABELS:
                yield path


@dataclass(frozen=True)
class _LabelLine:
    """A line of a label."""

    number: int  #: of the class
    points: tuple[float, ...]  #: x y x y ... of a polygon, or of two corners
    outline: bool  #: it is a polygon
    keypoints: tuple[float, ...] = ()


def _text_of(path: Path) -> str:
    data = read_bounded(path, _MOST_OF_A_LABEL)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text file: {error}") from error


def _lines(path: Path, description: YoloDescription, wrong: list[str]) -> Iterator[_LabelLine]:
    """The lines of a label; those that are wrong are added to `wrong` instead."""
    for place, text in enumerate(_text_of(path).splitlines(), 1):
        if not text.strip():
            continue
        try:
            yield _line(text.split(), description)
        except ValueError as error:
            wrong.append(f"{path} line {place}: {error}")
            if len(wrong) >= _MOST_WRONG:
                return


def _line(words: Sequence[str], description: YoloDescription) -> _LabelLine:
    """Raises ValueError with the reason."""
    values = []
    for word in words:
        try:
            values.append(float(word))
        except ValueError:
            raise ValueError(f"{word[:40]!r} is no number") from None
    number, *rest = values
    names = description.names
    if number not in names:
        raise ValueError(
            f"class {words[0]:.40}, but {description.path.name} names {len(names)} "
            f"({min(names)} to {max(names)}): add its name there, or correct the label"
        )
    if description.keypoints and len(values) == _BOX + description.keypoints:
        return _LabelLine(int(number), _corners(*_fractions(rest[:4])), outline=False, keypoints=tuple(rest[4:]))
    if len(values) == _BOX:
        return _LabelLine(int(number), _corners(*_fractions(rest)), outline=False)
    if description.keypoints:
        raise ValueError(
            f"{len(values)} values; with the kpt_shape of {description.path.name} a line has 5 of its box and "
            f"{description.keypoints} of keypoints"
        )
    if len(values) < _BOX or len(values) % 2 == 0:
        raise ValueError(
            f"{len(values)} values; a box has 5 (class, x and y of the centre, width, height), a polygon 7 or more, "
            "two for each point behind the class"
        )
    return _LabelLine(int(number), tuple(_fractions(rest)), outline=True)


def _fractions(values: Sequence[float]) -> Sequence[float]:
    for value in values:
        if not -_ROUNDING <= value <= 1 + _ROUNDING:
            raise ValueError(f"{value:g} is outside of [0, 1]: coordinates are fractions of width and height")
    return values


def _corners(x: float, y: float, width: float, height: float) -> tuple[float, ...]:
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _placed(line: _LabelLine, height: int, width: int, orientation: int) -> dict[str, Any]:
    """Box, area, polygon and keypoints of a line as COCO has them: in pixels of the picture as it is stored."""
    stored = _STORED.get(orientation, _STORED[1])
    points = [stored(x, y) for x, y in zip(line.points[::2], line.points[1::2], strict=True)]
    points = [(round(x * width, 3), round(y * height, 3)) for x, y in points]
    xs, ys = zip(*points, strict=True)
    left, top, right, bottom = min(xs), min(ys), max(xs), max(ys)
    found: dict[str, Any] = {"bbox": [left, top, round(right - left, 3), round(bottom - top, 3)]}
    if line.outline:
        found["segmentation"] = [[value for point in points for value in point]]
        turned = zip(points, [*points[1:], points[0]], strict=True)
        found["area"] = round(abs(sum(x1 * y2 - x2 * y1 for (x1, y1), (x2, y2) in turned)) / 2, 3)
    else:
        found["area"] = round((right - left) * (bottom - top), 3)
    if line.keypoints:
        found["keypoints"] = line.keypoints
    return found
