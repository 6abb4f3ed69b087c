"""Label maps -> annotations: one for each class of a map, its mask a run-length code, so that nothing is lost.

| layout | images | maps | number without a class |
|---|---|---|---|
| ADE20k | `images/{training,validation}` | `annotations/{training,validation}` | 0 |
| Cityscapes | `leftImg8bit/{train,val}` | `gtFine/{train,val}`, `*_labelIds.png` | all but 19 of 34 |
| one's own | `images/SPLIT` | `labels/SPLIT`, called as the images; `classes.txt`, a name a line | 255 |

A map is a PNG of class numbers, indexed or grey. Category ids are the numbers of the maps.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from faster_coco_eval import mask as coco_mask  # pycocotools' own warns under NumPy 2
from PIL import Image
from tqdm import tqdm

from visft_ds.files import MAX_PIXELS, checked_name, read_bytes, reading
from visft_ds.shards.coco import Findings, FolderSplit
from visft_ds.shards.yolo import SPLITS, SUFFIXES
from visft_ds.tasks.classes import VOID

#: The numbers that Cityscapes is judged by (https://github.com/mcordts/cityscapesScripts, labels.py).
CITYSCAPES = {
    **{7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light"},
    **{20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car"},
    **{27: "truck", 28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle"},
}


@dataclass(frozen=True)
class MapLayout:
    """How a data set keeps its label maps."""

    splits: Mapping[str, tuple[str, str]]  #: split -> folders of images and of maps
    names: Callable[[], dict[int, str]]  #: class numbers and their names
    void: frozenset[int]  #: numbers without a class
    endings: tuple[str, str] = ("", "")  #: of the names of images and maps, before the suffix


def map_layouts(folder: Path) -> Iterator[tuple[str, list[Path]]]:
    """(kind, folders of the maps) of each layout of the table above that a folder has."""
    for kind in ("ADE20k", "Cityscapes", "label maps"):
        if found := [folder / maps for _, maps in _layout(kind, folder, None).splits.values()]:
            yield kind, found


def read_maps(kind: str, folder: Path, wanted: str | None = None, void: int | None = None) -> list[FolderSplit]:
    """The splits of a folder with label maps, or the split `wanted` alone.

    `void` is the number of places without a class, in place of the layout's.

    Raises:
        ValueError: a map that is none, or with a number that has no name; more than a tenth of images or maps without
            the other.
    """
    layout = _layout(kind, folder, void)
    names, made = layout.names(), list[FolderSplit]()
    if len(names) > VOID - 1:
        raise ValueError(f"{folder} has {len(names)} classes; at most {VOID - 1} are allowed")
    categories = [{"id": number, "name": name} for number, name in names.items()]
    for split, (images, maps) in layout.splits.items():
        if wanted not in (None, split):
            continue
        pictures = _by_name(folder / images, SUFFIXES, layout.endings[0])
        labels, odd = _by_name(folder / maps, {".png"}, layout.endings[1]), Findings()
        for name in sorted(pictures.keys() ^ labels.keys()):
            odd.add("image without label map" if name in pictures else "label map without image", name)
        odd.refuse_above_a_tenth(len(pictures.keys() | labels.keys()), folder / maps, "images and label maps")
        both = sorted(pictures.keys() & labels.keys())
        content: dict[str, Any] = {"images": [], "annotations": [], "categories": categories}
        for number, name in enumerate(tqdm(both, desc=f"{split}: label maps", disable=None), 1):
            numbers = read_map(labels[name])
            file = checked_name(str(pictures[name].relative_to(folder / images)), folder / images)
            entry = {"id": number, "file_name": file, "height": numbers.shape[0], "width": numbers.shape[1]}
            content["images"].append(entry)
            for one in annotations_of_map(numbers, names, layout.void, labels[name]):
                identity = {"id": len(content["annotations"]) + 1, "image_id": number}
                content["annotations"].append({**identity, **one})
        made.append(FolderSplit(split, folder / images, None, None, odd, maps=content))
    return made


def read_map(path: Path) -> npt.NDArray[np.uint8]:
    """(H, W) class numbers of a PNG. Raises ValueError for another picture, or numbers above 255."""
    with reading(path, "a label map"), Image.open(io.BytesIO(read_bytes(path)), formats=("PNG",)) as image:
        if image.mode not in ("1", "P", "L", "I", "I;16"):
            raise ValueError(f"it is a picture of mode {image.mode}: give class numbers as indexed or grey PNG")
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels; allowed are {MAX_PIXELS:,} in all")
        numbers = np.asarray(image)
        if numbers.max() > VOID:
            raise ValueError(f"it holds the number {numbers.max()}; numbers from 0 to {VOID} are allowed")
        return numbers.astype(np.uint8)


def annotations_of_map(
    numbers: npt.NDArray[np.uint8], names: Mapping[int, str], void: frozenset[int], path: Path
) -> Iterator[dict[str, Any]]:
    """An annotation in COCO's terms, without ids, for each class of a map (H, W) that lies at `path`."""
    columns = np.asfortranarray(numbers)  # run-length codes go down columns
    for number in np.flatnonzero(np.bincount(numbers.ravel(), minlength=VOID + 1)).tolist():
        if number in void:
            continue
        if number not in names:
            known = f"the classes have {min(names)} to {max(names)}, places without one {min(void)} (--void N)"
            raise ValueError(f"{path}: the number {number} has no name: {known}")
        code = coco_mask.encode((columns == number).view(np.uint8))
        segmentation = {"size": list(numbers.shape), "counts": code["counts"].decode("ascii")}
        facts = {"bbox": coco_mask.toBbox(code).tolist(), "area": int(coco_mask.area(code)), "iscrowd": 0}
        yield {"category_id": number, **facts, "segmentation": segmentation}


def _layout(kind: str, folder: Path, void: int | None) -> MapLayout:
    """The layout of a kind, with those splits that the folder has."""
    if kind == "ADE20k":
        folders = {split: f"{split}ing" if split == "train" else "validation" for split in ("train", "val")}
        splits = {split: (f"images/{name}", f"annotations/{name}") for split, name in folders.items()}
        layout = MapLayout(splits, partial(_names_of_ade, folder / "objectInfo150.txt"), frozenset([void or 0]))
    elif kind == "Cityscapes":
        splits = {split: (f"leftImg8bit/{split}", f"gtFine/{split}") for split in ("train", "val")}
        others = frozenset(range(VOID + 1)) - CITYSCAPES.keys()
        layout = MapLayout(splits, lambda: CITYSCAPES, others, ("_leftImg8bit", "_gtFine_labelIds"))
    else:
        path, void = folder / "classes.txt", VOID if void is None else void
        parts = [part for part in sorted(folder.glob("labels/*/")) if path.is_file() and any(part.rglob("*.png"))]
        splits = {SPLITS.get(part.name, part.name): (f"images/{part.name}", f"labels/{part.name}") for part in parts}
        layout = MapLayout(splits, partial(_names_of_lines, path, int(void == 0)), frozenset([void]))
    there = {split: both for split, both in layout.splits.items() if all((folder / one).is_dir() for one in both)}
    return MapLayout(there, layout.names, layout.void, layout.endings)


def _names_of_ade(path: Path) -> dict[int, str]:
    """Number -> first of the names in ADE20k's table, whose columns are divided by tabs, the number in the first."""
    with reading(path, "ADE20k's table of 150 classes"):
        rows = [line.split("\t") for line in read_bytes(path).decode().splitlines()[1:] if line.strip()]
        return {int(row[0]): row[-1].split(",")[0].strip() for row in rows}


def _names_of_lines(path: Path, first: int) -> dict[int, str]:
    """Number -> name of the lines of a file; the first line has the number `first`."""
    with reading(path, "a list of classes, a name a line"):
        names = [line.strip() for line in read_bytes(path).decode("utf-8-sig").strip().splitlines()]
        if not names or not all(names) or len(set(names)) < len(names):
            raise ValueError("each line must hold a name of its own")
        return dict(enumerate(names, first))


def _by_name(folder: Path, suffixes: set[str] | frozenset[str], ending: str) -> dict[str, Path]:
    """Name without ending and suffix -> file, of all in a folder."""
    found = (path for path in folder.rglob("*") if path.suffix.lower() in suffixes and path.stem.endswith(ending))
    named = ((str(path.relative_to(folder).with_suffix("")).removesuffix(ending), path) for path in found)
    return {name: path for name, path in named if path.is_file()}
