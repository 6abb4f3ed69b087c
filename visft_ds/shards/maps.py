"""Label maps -> annotations: one for each class of a map, its mask a run-length code, so that nothing is
lost.

| layout | images | maps | number without a class |
|---|---|---|---|
| ADE20k | `images/{training,validation}` | `annotations/{training,validation}` | 0 |
| Cityscapes | `leftImg8bit/{train,val}` | `gtFine/{train,val}`, `*_labelIds.png` | all but 19 of 34 |
| one's own | `images/SPLIT` | `labels/SPLIT`, called as the images; `classes.txt`, a name a line | 255 |

A map is a PNG of class numbers, indexed or grey. Category ids are the numbers of the maps.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from faster_coco_eval import mask as coco_mask  # pycocotools' own warns under NumPy 2
from PIL import Image
from tqdm import tqdm

from visft_ds.files import MAX_PIXELS, read_bytes, reading
from visft_ds.shards.coco import Findings, FolderSplit
from visft_ds.shards.yolo import SPLITS, SUFFIXES
from visft_ds.tasks.classes import VOID

#: The numbers that Cityscapes is judged by (https://github.com/mcordts/cityscapesScripts, labels.py).
CITYSCAPES = {
    **{7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light"},
    **{20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car"},
    **{27: "truck", 28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle"},
}

#: Layout -> split -> folders of images and of maps; and what the names of both end with, before the suffix.
_FOLDERS = {
    "ADE20k": {
        s: (f"images/{n}", f"annotations/{n}") for s, n in (("train", "training"), ("val", "validation"))
    },
    "Cityscapes": {split: (f"leftImg8bit/{split}", f"gtFine/{split}") for split in ("train", "val")},
}
_ENDINGS = {"Cityscapes": ("_leftImg8bit", "_gtFine_labelIds")}
OWN = "label maps"  #: the layout for maps of one's own
CLASSES = "classes.txt"  #: its list of names


def map_layouts(folder: Path) -> Iterator[tuple[str, list[Path]]]:
    """(kind, folders of the maps) of each layout of the table above that a folder has."""
    for kind in (*_FOLDERS, OWN):
        if found := [maps for _, maps in _splits(kind, folder).values()]:
            yield kind, found


def read_maps(
    kind: str, folder: Path, wanted: str | None = None, void: int | None = None
) -> list[FolderSplit]:
    """The splits of a folder with label maps, or the split `wanted` alone.

    `void` is the number that means no class, instead of the layout's; if it has a name, that is dropped.

    Raises:
        ValueError: a map that is none, or with a number that has no name; more than a tenth of images or maps
        without
            the other; a split in which no pixel has a class.
    """
    names, voids, dropped = classes_of_maps(kind, folder, void)
    made = list[FolderSplit]()
    categories = [{"id": number, "name": name} for number, name in names.items()]
    for split, (images, maps) in _splits(kind, folder).items():
        if wanted not in (None, split):
            continue
        endings, odd = _ENDINGS.get(kind, ("", "")), Findings()
        pictures, labels = _by_name(images, SUFFIXES, endings[0]), _by_name(maps, {".png"}, endings[1])
        for name in sorted(pictures.keys() ^ labels.keys()):
            odd.add("image without label map" if name in pictures else "label map without image", name)
        odd.refuse_above_a_tenth(len(pictures.keys() | labels.keys()), maps, "images and label maps")
        if dropped:
            odd.add("name dropped: its number means no class (--void)", dropped)
        content: dict[str, Any] = {"images": [], "annotations": [], "categories": categories}
        counts = np.zeros(VOID + 1, dtype=np.int64)  # pixels of each number
        both = tqdm(sorted(pictures.keys() & labels.keys()), desc=f"{split}: label maps", disable=None)
        for number, name in enumerate(both, 1):
            numbers = read_map(labels[name])
            counts += np.bincount(numbers.ravel(), minlength=VOID + 1)
            (height, width), file = numbers.shape, str(pictures[name].relative_to(images))
            content["images"].append({"id": number, "file_name": file, "height": height, "width": width})
            for one in annotations_of_map(numbers, names, voids, labels[name]):
                content["annotations"].append(
                    {"id": len(content["annotations"]) + 1, "image_id": number, **one}
                )
        _check_used(counts, names, voids, odd, maps)
        made.append(FolderSplit(split, images, None, None, content, odd=odd))
    return made


def read_map(path: Path) -> npt.NDArray[np.uint8]:
    """(H, W) class numbers of a PNG. Raises ValueError for another picture, or numbers above 255."""
    with reading(path, "a label map"), Image.open(io.BytesIO(read_bytes(path)), formats=("PNG",)) as image:
        if image.mode not in ("1", "P", "L", "I", "I;16"):
            raise ValueError(
                f"it is a picture of mode {image.mode}: give class numbers as indexed or grey PNG"
            )
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels; allowed are {MAX_PIXELS:,} in all")
        numbers = np.asarray(image)
        if numbers.max() > VOID:
            raise ValueError(f"it holds the number {numbers.max()}; numbers from 0 to {VOID} are allowed")
        return numbers.astype(np.uint8)


def _check_used(
    counts: npt.NDArray[np.int64], names: Mapping[int, str], voids: frozenset[int], odd: Findings, maps: Path
) -> None:
    """Add classes without a pixel to what is odd, if pixels without a class exist: as in maps of 0 and 255.

    `counts` are the pixels of each number in the maps of a split. Raises ValueError if none has a class.
    """
    used = np.flatnonzero(counts).tolist()
    if not used:
        return
    numbers = ", ".join(map(str, used[:10])) + (" ..." if len(used) > 10 else "")
    without_class = sorted(voids.intersection(used))
    if not without_class:
        return
    if len(without_class) == len(used):
        text = f"all pixels are {numbers}, which means no class: number the classes from 0, or give another --void"
        raise ValueError(f"{maps}: {text}")
    kind = f"class without a pixel; the maps hold {numbers}, and {without_class[0]} means no class (--void N)"
    for number, name in names.items():
        if not counts[number]:
            odd.add(kind, f"{number} {name}")


def annotations_of_map(
    numbers: npt.NDArray[np.uint8], names: Mapping[int, str], voids: frozenset[int], path: Path
) -> Iterator[dict[str, Any]]:
    """An annotation in COCO's terms, without ids, for each class of a map (H, W) that lies at `path`."""
    columns = np.asfortranarray(numbers)  # run-length codes go down columns
    for number in numbers_with_class(numbers, names, voids, path):
        code = coco_mask.encode((columns == number).view(np.uint8))
        segmentation = {"size": list(numbers.shape), "counts": code["counts"].decode("ascii")}
        facts = {"bbox": coco_mask.toBbox(code).tolist(), "area": int(coco_mask.area(code)), "iscrowd": 0}
        yield {"category_id": number, **facts, "segmentation": segmentation}


def numbers_with_class(
    numbers: npt.NDArray[np.uint8], names: Mapping[int, str], voids: frozenset[int], path: Path
) -> list[int]:
    """The numbers of a map (H, W) that have a class. Raises ValueError for one without a name."""
    used = np.flatnonzero(np.bincount(numbers.ravel(), minlength=VOID + 1)).tolist()
    having = [number for number in used if number not in voids]
    nameless = [number for number in having if number not in names]
    if nameless:
        known = f"classes are numbered {min(names)} to {max(names)}, and {min(voids)} means no class"
        raise ValueError(
            f"{path}: the number {nameless[0]} has no name: {known} (--void N; of visft judge void=N)"
        )
    return having


def _splits(kind: str, folder: Path) -> dict[str, tuple[Path, Path]]:
    """Split -> folders of images and maps, of those splits of a layout that a folder has."""
    if kind == OWN and (folder / CLASSES).is_file():
        parts = [part.name for part in sorted(folder.glob("labels/*/")) if any(part.rglob("*.png"))]
        folders = {SPLITS.get(part, part): (f"images/{part}", f"labels/{part}") for part in parts}
    else:
        folders = _FOLDERS.get(kind, {})
    there = {split: (folder / images, folder / maps) for split, (images, maps) in folders.items()}
    return {split: both for split, both in there.items() if all(one.is_dir() for one in both)}


def classes_of_maps(kind: str, folder: Path, void: int | None) -> tuple[dict[int, str], frozenset[int], str]:
    """(number -> name, numbers without a class, number and name that `void` drops) of a data set.

    Raises ValueError for a wrong list of names, and for a `void` out of range or that the layout does not
    take.
    """
    if kind == "Cityscapes":
        if void is not None:
            raise ValueError("--void does not apply to Cityscapes: all but 19 of its numbers mean no class")
        return CITYSCAPES, frozenset(range(VOID + 1)) - CITYSCAPES.keys(), ""
    if void is None:
        void = VOID if kind == OWN else 0
    if not 0 <= void <= VOID:
        raise ValueError(f"void number {void} is not allowed: numbers in label maps are 0 to {VOID}")
    path = folder / (CLASSES if kind == OWN else "objectInfo150.txt")
    with reading(path, "a list of classes, one name per line"):
        lines = [line.strip() for line in read_bytes(path).decode("utf-8-sig").strip().splitlines()]
        names = dict(enumerate(lines, int(void == 0)))
        if kind != OWN:  # a table: a line of titles, then the number first and the names last
            rows = [line.split("\t") for line in lines[1:]]
            names = {int(row[0]): row[-1].split(",")[0].strip() for row in rows}
        expected = len(lines) - (kind != OWN)
        if not 0 < expected < VOID or len(set(names.values()) - {""}) != expected:
            raise ValueError(f"it has {len(lines)} lines; 1 to {VOID - 1} names, no two alike, are allowed")
        dropped = f"{void} {names.pop(void)}" if void in names else ""
        if not names:
            raise ValueError(f"the void number {void} leaves none of its names")
        return names, frozenset([void]), dropped


def _by_name(folder: Path, suffixes: set[str] | frozenset[str], ending: str) -> dict[str, Path]:
    """Name without ending and suffix -> file, of all in a folder."""
    found = (
        path for path in folder.rglob("*") if path.suffix.lower() in suffixes and path.stem.endswith(ending)
    )
    named = ((str(path.relative_to(folder).with_suffix("")).removesuffix(ending), path) for path in found)
    return {name: path for name, path in named if path.is_file()}
