"""Images with a label for each place in them, and where there are such, the outlines of their objects.

| layout | found by | void |
|---|---|---|
| COCO tree | `annotations/instances_<split>2017.json` beside `<split>2017/` | crowds |
| shards of ours | a manifest of the split | crowds |
| ADE20k | `images/{training,validation}`, `annotations/{training,validation}` | 0 |
| any | `images/<split>`, `labels/<split>` | 255 |

Label maps are PNG files that hold class numbers (indexed or grey), called as their images. Images are stretched to
squares and labels to CELLS x CELLS cells (stride 4 at 224 pixels), the same for every model: a cell has the label of
most of its pixels. Of COCO's objects, each lies on top of the larger ones; what no object covers is class 0, in shards
of label maps void.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from faster_coco_eval import mask as coco_mask  # pycocotools' own warns under NumPy 2
from PIL import Image

from visft_ds.data.dataset import labels_of_split
from visft_ds.data.shards import Manifest, ShardReader, manifest_path
from visft_ds.evals.judge.images import (
    SUFFIXES,
    chosen,
    digest,
    from_files,
    image_files,
    inside,
    read_json,
)
from visft_ds.evals.judge.protocol import ImageSet, IntArray
from visft_ds.files import MAX_PIXELS, open_image, read_bytes, reading
from visft_ds.monitor.console import gauge
from visft_ds.shards.coco import stored_segmentation

CELLS, VOID = 56, -1
#: Images of a part; a larger one gives every k-th.
MOST = {"train": 1000, "test": 2000}
_FINE = 4  # pixels of a cell's side
_SIDE = CELLS * _FINE
_SMALLEST = 1.0  # cells below which nobody could recognise an object
_SPLITS = ("val", "test", "validation")

Cells = npt.NDArray[np.int16]
Shares = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class DenseSet:
    """Images, what is where in them, and their objects."""

    images: ImageSet
    cells: Cells  #: (images, CELLS, CELLS), class or VOID
    masks: Shares  #: (objects, CELLS, CELLS), how many 16ths of a cell an object covers
    labels: IntArray  #: (objects,), places in `names`
    owners: IntArray  #: (objects,), numbers of their images
    names: tuple[str, ...]  #: of the categories of objects; empty where no objects are known

    @property
    def classes(self) -> int:
        """Number of classes of cells."""
        return int(self.cells.max()) + 1

    @property
    def truth(self) -> str:
        """Hash of all labels."""
        return digest(
            np.ascontiguousarray(part).tobytes() for part in (self.cells, self.masks, self.labels, self.owners)
        )


def read_train_and_test(source: str, train: str | None, test: str | None) -> tuple[DenseSet, DenseSet]:
    """(images to train probes on, images to judge them on), in any layout of the table above.

    Raises:
        ValueError: no such folder or layout, a part that is not there or is not labelled, other categories in both.
    """
    root = Path(source)
    if not root.is_dir():
        raise ValueError(f"{source}: no such folder; give one with images and labels")
    reader, parts = _layout(root)
    learnt, held = train or "train", test or next((name for name in _SPLITS if name in parts), "val")
    for part in (learnt, held):
        if part not in parts:
            raise ValueError(f"{source} has no part {part}; it has {', '.join(parts)}")
    if learnt == held:
        raise ValueError(f"{source}: probes would learn from {learnt} and be judged on it: name two parts")
    found = reader(learnt, MOST["train"]), reader(held, MOST["test"])
    if found[0].names != found[1].names:
        lone = sorted(set(found[0].names) ^ set(found[1].names))
        raise ValueError(f"{source}: {learnt} and {held} have other categories or order: {', '.join(lone[:5])}")
    for part, one in zip((learnt, held), found, strict=True):
        if len(np.unique(one.cells[one.cells != VOID])) < 2:
            raise ValueError(f"{source}: {part} has labels of one class only; a probe needs two")
    return found


Reader = Callable[[str, int], DenseSet]


def _layout(root: Path) -> tuple[Reader, Sequence[str]]:
    """(what reads a part, names of the parts) of a folder."""
    trees = root.glob("annotations/instances_*2017.json")
    if splits := sorted(path.stem.removeprefix("instances_").removesuffix("2017") for path in trees):
        return partial(_of_coco, root), splits
    suffix = manifest_path(root, "").name
    if splits := sorted(path.name.removesuffix(suffix) for path in root.glob(f"*{suffix}")):
        return partial(_of_shards, root), splits
    if (root / "annotations/training").is_dir():
        known = {"train": "training", "val": "validation"}
        return partial(_of_folders, root, lambda s: (f"images/{known[s]}", f"annotations/{known[s]}"), 0), list(known)
    if (root / "labels").is_dir():
        parts = sorted(path.name for path in (root / "labels").iterdir() if path.is_dir())
        return partial(_of_folders, root, lambda split: (f"images/{split}", f"labels/{split}"), 255), parts
    raise ValueError(f"{root} has no dense labels: give a COCO tree, shards, ADE20k, or images/SPLIT and labels/SPLIT")


def _places(count: int, most: int) -> list[int]:
    """Every k-th place, so that there are `most` of them or fewer."""
    return list(range(0, count, max(1, -(-count // most))))


def _of_folders(root: Path, folders: Callable[[str], tuple[str, str]], void: int, split: str, most: int) -> DenseSet:
    """Images beside their label maps."""
    place, labels = (root / name for name in folders(split))
    files = image_files(place) if place.is_dir() else []
    if not files:
        raise ValueError(f"{place} has no images ({', '.join(SUFFIXES)}): it should hold those of {labels}")
    kept = [files[number] for number in _places(len(files), most)]
    maps = [labels / f"{path.stem}.png" for path in kept]
    cells = np.stack([_cells_of_map(path, void) for path in gauge("label maps", len(maps), "images", maps)])
    images, none = replace(from_files(kept, root), stretched=True), np.zeros(0, dtype=np.int64)
    return DenseSet(images, cells, np.zeros((0, CELLS, CELLS), np.uint8), none, none, ())


def _cells_of_map(path: Path, void: int) -> Cells:
    """(CELLS, CELLS) of a PNG of class numbers, which are kept as they are."""
    with reading(path, "a label map"), Image.open(io.BytesIO(read_bytes(path)), formats=("PNG",)) as image:
        if image.mode not in ("P", "L", "I", "I;16"):
            raise ValueError(f"it is a picture of mode {image.mode}: give class numbers as indexed or grey PNG")
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels; allowed are {MAX_PIXELS:,} in all")
        numbers = np.asarray(image.resize((_SIDE, _SIDE), Image.Resampling.NEAREST)).astype(np.int64)
        numbers[numbers == void] = VOID
        if numbers.max() >= 1 << 12:
            raise ValueError(f"it holds class {numbers.max()}: class numbers are below {1 << 12}, and {void} is void")
        return _most_of(numbers)


def _most_of(numbers: IntArray) -> Cells:
    """(CELLS, CELLS), the most frequent number of each cell of (_SIDE, _SIDE); of equally frequent ones the least."""
    kinds, places = np.unique(numbers, return_inverse=True)
    blocks = places.reshape(CELLS, _FINE, CELLS, _FINE).transpose(0, 2, 1, 3).reshape(CELLS * CELLS, _FINE**2)
    counts = np.zeros((len(blocks), len(kinds)), dtype=np.int64)
    np.add.at(counts, (np.arange(len(blocks))[:, None], blocks), 1)
    most: Cells = kinds[counts.argmax(axis=1)].astype(np.int16).reshape(CELLS, CELLS)
    return most


def _of_coco(root: Path, split: str, most: int) -> DenseSet:
    path, folder = root / f"annotations/instances_{split}2017.json", root / f"{split}2017"
    with reading(path, "a COCO annotation file"):
        content = read_json(path)
        kept = [content["images"][place] for place in _places(len(content["images"]), most)]
        of_image: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in kept}
        for one in content["annotations"]:
            if one["image_id"] in of_image:
                of_image[one["image_id"]].append(one | {"iscrowd": one.get("iscrowd", 0)})
        files = [inside(folder, image["file_name"], path) for image in kept]
        categories = {category["id"]: str(category["name"]) for category in content["categories"]}
        labels = [((int(image["height"]), int(image["width"])), of_image[image["id"]]) for image in kept]
        return _of_outlines(from_files(files, folder), labels, categories, str(path))


def _of_shards(root: Path, split: str, most: int) -> DenseSet:
    manifest = Manifest.load(str(root), split)
    reader = ShardReader(manifest)
    places = _places(len(reader), most)
    found = labels_of_split(reader, places)
    labels = [((label["height"], label["width"]), label["annotations"]) for label in found]
    names = [f"{split} {manifest.index[place]['image_id']}" for place in range(len(reader))]

    def read(place: int) -> Image.Image:
        data, _ = reader.read(place, "images")
        return open_image(data or b"", reader.describe(place), upright=False)

    images = chosen(ImageSet(names, read, digest((manifest.fingerprint,))), places)
    categories = {category.coco_id: category.name for category in manifest.categories}
    empty = VOID if "maps" in manifest.labels else 0
    return _of_outlines(images, labels, categories, f"{root}/{split}", empty)


def _of_outlines(
    images: ImageSet,
    labels: Sequence[tuple[tuple[int, int], Sequence[Mapping[str, Any]]]],
    categories: Mapping[int, str],
    where: str,
    empty: int = 0,
) -> DenseSet:
    """Images with the annotations of each, in COCO's terms; cells that no annotation covers are of class `empty`."""
    numbers = {category: number for number, category in enumerate(sorted(categories))}
    cells, masks, objects = [], [], []
    for number, (size, found) in enumerate(gauge("outlines", len(labels), "images", labels)):
        drawn = np.full((_SIDE, _SIDE), empty, dtype=np.int64)
        outlined = [(annotation, _outline(annotation, size, where)) for annotation in found]
        for annotation, area in sorted(outlined, key=lambda one: -int(one[1].sum())):
            if annotation["category_id"] not in numbers:
                raise ValueError(f"{where}: an annotation has category {annotation['category_id']} of no list")
            label = numbers[annotation["category_id"]]
            drawn[area] = VOID if annotation["iscrowd"] else label + 1
            share = area.reshape(CELLS, _FINE, CELLS, _FINE).sum(axis=(1, 3)).astype(np.uint8)
            if not annotation["iscrowd"] and share.sum() >= _SMALLEST * _FINE**2:
                masks.append(share)
                objects.append((label, number))
        cells.append(_most_of(drawn))
    if not objects:
        raise ValueError(f"{where} has no object of at least {_SMALLEST:g} of {CELLS} x {CELLS} cells that is no crowd")
    owned = np.array(objects, dtype=np.int64)
    names = tuple(categories[category] for category in sorted(categories))
    return DenseSet(replace(images, stretched=True), np.stack(cells), np.stack(masks), owned[:, 0], owned[:, 1], names)


def _outline(annotation: Mapping[str, Any], size: tuple[int, int], where: str) -> npt.NDArray[np.bool_]:
    """(_SIDE, _SIDE) of a mask, or of the box where there is none; polygons are drawn at this size, not the image's."""
    height, width = size
    stretch = np.array([_SIDE / width, _SIDE / height])
    given = annotation.get("segmentation") or None
    shape = stored_segmentation(given, height, width)
    if shape is None and given is not None:
        raise ValueError(f"{where}: a mask of image {annotation.get('image_id')} is no segmentation")
    if isinstance(shape, Mapping):
        mask = Image.fromarray(coco_mask.decode(dict(shape)))
        return np.asarray(mask.resize((_SIDE, _SIDE), Image.Resampling.NEAREST)).astype(bool)
    if not shape:
        x, y, wide, high = annotation["bbox"]
        shape = [[x, y, x + wide, y, x + wide, y + high, x, y + high]]
    polygons = [(np.reshape(polygon, (-1, 2)) * stretch).clip(0, _SIDE).ravel().tolist() for polygon in shape]
    drawn = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, _SIDE, _SIDE)))
    return np.asarray(drawn).astype(bool)
