"""Images with a class for each pixel, and where there are such, the outlines of their objects.

| layout | found by | no class |
|---|---|---|
| COCO tree | `annotations/instances_<split>2017.json` beside `<split>2017/` | crowds |
| shards of ours | a manifest of the split | crowds |
| ADE20k | `images/{training,validation}`, `annotations/{training,validation}` | 0; class n is number n + 1 |
| Pascal VOC | `JPEGImages`, `SegmentationClass`, `ImageSets/Segmentation/{train,val}.txt` | 255 |
| any | `images/<split>`, `labels/<split>` | 255 |

Label maps are PNG files of class numbers (indexed or grey), called as their images. Labels keep their size; images are
stretched to squares. Of COCO's objects, each lies on top of the larger ones; what no object covers is class 0, in
shards of label maps without a class.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
from faster_coco_eval import mask as coco_mask  # pycocotools' own warns under NumPy 2
from PIL import Image

from visft_ds.data.dataset import labels_of_split
from visft_ds.data.shards import Category, Manifest, ShardReader, manifest_path
from visft_ds.evals.judge.images import SUFFIXES, chosen, digest, from_files, image_files, read_lines
from visft_ds.evals.judge.protocol import ImageSet, Label
from visft_ds.files import open_image, reading
from visft_ds.monitor.console import gauge
from visft_ds.shards.coco import read_coco
from visft_ds.shards.maps import read_map
from visft_ds.tasks.classes import VOID

_SMALLEST = 1 / 3136  # of an image, below which nobody could recognise an object
_SPLITS = ("val", "test", "validation")


@dataclass(frozen=True)
class Thing:
    """An object of an image."""

    owner: int  #: number of the image
    label: int
    code: Mapping[str, Any]  #: run-length code of its pixels
    crowd: bool = False

    @property
    def area(self) -> int:
        """Number of its pixels."""
        return int(coco_mask.area(self.code))

    @property
    def box(self) -> tuple[float, ...]:
        """Left, top, width and height."""
        return tuple(coco_mask.toBbox(self.code).tolist())

    @property
    def mask(self) -> npt.NDArray[np.uint8]:
        """(H, W), 1 where it is."""
        found: npt.NDArray[np.uint8] = coco_mask.decode(self.code)
        return found


@dataclass(frozen=True)
class DenseSet:
    """Images, what is where in them, and their objects."""

    images: ImageSet
    label: Callable[[int], npt.NDArray[Any]]  #: of an image; in metres where depth is asked
    classes: tuple[str, ...]  #: their names; "": no object is there
    things: tuple[Thing, ...] = ()  #: objects that are large enough and no crowds, in the order of their images

    def part(self, places: Sequence[int]) -> DenseSet:
        """Some of the images."""
        numbers = {place: number for number, place in enumerate(places)}
        things = tuple(replace(one, owner=numbers[one.owner]) for one in self.things if one.owner in numbers)
        return DenseSet(chosen(self.images, places), lambda number: self.label(places[number]), self.classes, things)


def read_train_and_test(
    most: Mapping[str, int], source: str, train: str | None = None, test: str | None = None
) -> tuple[DenseSet, DenseSet]:
    """(images to train probes on, images to judge them on), in any layout of the table above.

    Args:
        most: images of "train" and "test"; of a larger part every k-th.

    Raises:
        ValueError: no such folder or layout, a part that is not there or is not labelled, other categories in both.
    """
    if not Path(source).is_dir():
        raise ValueError(f"{source}: no such folder; give one with images and labels")
    reader, parts = _layout(Path(source))
    learnt, held = parts_of(source, parts, train, test)
    found = [reader(learnt, most["train"]), reader(held, most["test"])]
    seen = []
    for part, one in zip((learnt, held), found, strict=True):
        counts = np.zeros(VOID + 1, dtype=np.int64)
        for place in gauge(f"labels of {part}", len(one.images), "images", range(len(one.images))):
            counts += np.bincount(one.label(place).ravel(), minlength=VOID + 1)
        seen.append(np.flatnonzero(counts[:VOID]))
        if len(seen[-1]) < 2:
            raise ValueError(f"{source}: {part} has labels of one class only; a probe needs two")
    if not found[0].classes:  # label maps do not name them
        numbers = tuple(map(str, range(int(max(map(max, seen))) + 1)))
        found = [replace(one, classes=numbers) for one in found]
    if found[0].classes != found[1].classes:
        lone = sorted(set(found[0].classes) ^ set(found[1].classes))
        raise ValueError(f"{source}: {learnt} and {held} have other categories or order: {', '.join(lone[:5])}")
    return found[0], found[1]


def parts_of(source: str, parts: Sequence[str], train: str | None, test: str | None) -> tuple[str, str]:
    """(part to train on, part to judge on) of those that a data set has; the given ones or the usual ones."""
    learnt, held = train or "train", test or next((name for name in _SPLITS if name in parts), "val")
    for part in (learnt, held):
        if part not in parts:
            raise ValueError(f"{source} has no part {part}; it has {', '.join(parts) or 'none'}")
    if learnt == held:
        raise ValueError(f"{source}: probes would learn from {learnt} and be judged on it: name two parts")
    return learnt, held


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
        of_ade = {name: (root / "images" / folder, root / "annotations" / folder) for name, folder in known.items()}
        return lambda part, most: of_maps(root, *of_ade[part], most, _ade), list(known)
    if listed := sorted(root.glob("ImageSets/Segmentation/*.txt")):
        folders = root / "JPEGImages", root / "SegmentationClass"
        names = {path.stem: frozenset(read_lines(path)) for path in listed}
        return lambda part, most: of_maps(root, *folders, most, names=names[part]), list(names)
    if (root / "labels").is_dir():
        parts = sorted(path.name for path in (root / "labels").iterdir() if path.is_dir())
        return lambda part, most: of_maps(root, root / "images" / part, root / "labels" / part, most), parts
    raise ValueError(
        f"{root} has no labels of pixels: give a COCO tree, shards, ADE20k, VOC, or images/SPLIT and labels/SPLIT"
    )


def _ade(path: Path) -> Label:
    return read_map(path) - np.uint8(1)  # 0 becomes 255


def every(count: int, most: int) -> list[int]:
    """Every k-th place, so that there are `most` of them or fewer."""
    return list(range(0, count, max(1, -(-count // most))))


def of_maps(
    root: Path,
    folder: Path,
    labels: Path,
    most: int,
    read: Callable[[Path], npt.NDArray[Any]] = read_map,
    names: Collection[str] | None = None,
) -> DenseSet:
    """Images beside maps that are called as they are; `names` are those of the files, if not all count."""
    files = image_files(folder) if folder.is_dir() else []
    files = [path for path in files if names is None or path.stem in names]
    if not files:
        raise ValueError(f"{folder} has no images ({', '.join(SUFFIXES)}): it should hold those of {labels}")
    kept = [files[number] for number in every(len(files), most)]
    maps = [labels / f"{path.stem}.png" for path in kept]
    images = from_files(kept, root)

    def label(place: int) -> npt.NDArray[Any]:
        numbers = read(maps[place])
        with reading(kept[place], "an image"), Image.open(kept[place]) as image:
            if image.size != numbers.shape[::-1]:
                raise ValueError(
                    f"it has {image.width} x {image.height} pixels, and its label map {maps[place]} others"
                )
        return numbers

    stamped = digest((images.fingerprint, from_files(maps, root).fingerprint))
    return DenseSet(replace(images, stretched=True, fingerprint=stamped), label, ())


def _of_coco(root: Path, split: str, most: int) -> DenseSet:
    source = read_coco(root / f"annotations/instances_{split}2017.json", None)
    kept = [source.images[place] for place in every(len(source.images), most)]
    folder = root / f"{split}2017"
    images = from_files([folder / image.file_name for image in kept], folder)
    return _of_outlines(images, [orjson.loads(image.label()) for image in kept], source.categories)


def _of_shards(root: Path, split: str, most: int) -> DenseSet:
    manifest = Manifest.load(str(root), split)
    reader = ShardReader(manifest)
    places = every(len(reader), most)
    names = [f"{split} {manifest.index[place]['image_id']}" for place in range(len(reader))]

    def read(place: int) -> Image.Image:
        data, _ = reader.read(place, "images")
        return open_image(data or b"", reader.describe(place), upright=False)

    images = chosen(ImageSet(names, read, digest((manifest.fingerprint,))), places)
    labels = list(labels_of_split(reader, places))
    return _of_outlines(images, labels, manifest.categories, [] if "maps" in manifest.labels else [""])


def _of_outlines(
    images: ImageSet, labels: Sequence[Mapping[str, Any]], categories: Sequence[Category], empty: Sequence[str] = ("",)
) -> DenseSet:
    """Images with their labels as shards have them; `empty` is the name of what no object covers, if any."""
    if len(categories) + len(empty) > VOID:
        raise ValueError(f"{images.names[0]} has {len(categories)} categories; at most {VOID - 1} are allowed")
    ordered = sorted(categories, key=lambda category: category.coco_id)
    numbers = {category.coco_id: number for number, category in enumerate(ordered, len(empty))}
    things: list[list[Thing]] = []
    for owner, image in enumerate(labels):
        outlined = [
            Thing(
                owner, numbers[one["category_id"]], _outline(one, image["height"], image["width"]), bool(one["iscrowd"])
            )
            for one in image["annotations"]
        ]
        things.append(sorted(outlined, key=lambda thing: -thing.area))

    def label(place: int) -> Label:
        size = labels[place]["height"], labels[place]["width"]
        drawn = np.full(size, 0 if empty else VOID, dtype=np.uint8)
        for thing in things[place]:
            drawn[thing.mask == 1] = VOID if thing.crowd else thing.label
        return drawn

    classes = (*empty, *(category.name for category in ordered))
    facts = [[one.owner, one.label, one.crowd, one.code["counts"]] for found in things for one in found]
    stamped = replace(images, stretched=True, fingerprint=digest((images.fingerprint, str(facts))))
    large = (
        thing
        for image, found in zip(labels, things, strict=True)
        for thing in found
        if not thing.crowd and thing.area >= _SMALLEST * image["height"] * image["width"]
    )
    return DenseSet(stamped, label, classes, tuple(large))


def _outline(annotation: Mapping[str, Any], height: int, width: int) -> Mapping[str, Any]:
    """Run-length code of a mask, or of the box where there is none."""
    x, y, wide, high = annotation["bbox"]
    shape = annotation.get("segmentation") or [[x, y, x + wide, y, x + wide, y + high, x, y + high]]
    code: Mapping[str, Any] = (
        shape if isinstance(shape, Mapping) else coco_mask.merge(coco_mask.frPyObjects(shape, height, width))
    )
    return code
