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

Depth: `images/<split>` and `depth/<split>`, 16-bit PNG files of millimetres, called as the images; 0 is not known. In
maps of 480 x 640 pixels, NYU Depth v2's, the part counts that Eigen et al. named.
"""

from __future__ import annotations

import io
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

from visft_ds.data.shards import Category, Manifest, ShardReader, splits_in
from visft_ds.evals.judge.images import SUFFIXES, chosen, digest, from_files, image_files, read_lines
from visft_ds.evals.judge.protocol import ImageSet, Label
from visft_ds.files import image_frame, open_image, read_bytes, reading
from visft_ds.monitor.console import gauge
from visft_ds.shards.coco import read_coco
from visft_ds.shards.maps import read_map
from visft_ds.tasks.classes import VOID

_SMALLEST = 1 / 3136  # of an image, below which nobody could recognise an object
_SPLITS = ("val", "test", "validation")
NEAREST, FARTHEST = 1e-3, 10.0  #: metres
NYU = (480, 640)  #: height and width
TAUGHT = slice(45, 472), slice(43, 608)  #: rows and columns of it without the white border of training images
_EIGEN = slice(45, 471), slice(41, 601)


@dataclass(frozen=True)
class Thing:
    """An object of an image."""

    owner: int  #: number of the image
    label: int  #: VOID for a crowd
    code: Mapping[str, Any]  #: run-length code of its pixels


@dataclass(frozen=True)
class DenseSet:
    """Images, what is where in them, and their objects."""

    images: ImageSet
    label: Callable[[int], npt.NDArray[Any]]  #: of an image; in metres where depth is asked
    classes: tuple[str, ...] = ()  #: their names; "": no object is there
    things: tuple[Thing, ...] = ()  #: objects that are large enough and no crowds, in the order of their images

    def part(self, places: Sequence[int]) -> DenseSet:
        """Some of the images, without their objects."""
        return DenseSet(chosen(self.images, places), lambda number: self.label(places[number]), self.classes)


def read_train_and_test(
    most: Mapping[str, int], source: str, train: str | None = None, test: str | None = None
) -> tuple[DenseSet, DenseSet]:
    """(images to train probes on, images to judge them on), in any layout of the table above.

    Args:
        most: images of "train" and "test"; of a larger part every k-th.

    Raises:
        ValueError: no such folder or layout, a part that is not there or is not labelled, other categories in both.
    """
    parts = _parts(Path(source))
    names = _chosen(source, parts, train, test)
    found = [parts[name](count) for name, count in zip(names, (most["train"], most["test"]), strict=True)]
    seen = []
    for name, part in zip(names, found, strict=True):
        counts = np.zeros(VOID + 1, dtype=np.int64)
        for place in gauge(f"labels of {name}", len(part.images), "images", range(len(part.images))):
            counts += np.bincount(part.label(place).ravel(), minlength=VOID + 1)
        seen.append(np.flatnonzero(counts[:VOID]))
        if len(seen[-1]) < 2:
            raise ValueError(f"{source}: {name} has labels of one class only; a probe needs two")
    if not found[0].classes:  # label maps do not name them
        numbers = tuple(map(str, range(int(max(map(max, seen))) + 1)))
        found = [replace(part, classes=numbers) for part in found]
    if found[0].classes != found[1].classes:
        lone = sorted(set(found[0].classes) ^ set(found[1].classes))
        raise ValueError(f"{source}: {' and '.join(names)} have other categories or order: {', '.join(lone[:5])}")
    return found[0], found[1]


def _chosen(source: str, parts: Collection[str], train: str | None, test: str | None) -> tuple[str, str]:
    """(part to train on, part to judge on) of those that a data set has; the given ones or the usual ones."""
    learnt, held = train or "train", test or next((name for name in _SPLITS if name in parts), "val")
    if learnt == held or not {learnt, held} <= set(parts):
        has = f"it has {', '.join(parts) or 'no parts'}"
        raise ValueError(f"{source}: probes cannot learn from {learnt} and be judged on {held}: name two parts; {has}")
    return learnt, held


def read_depth(
    most: Mapping[str, int], source: str, train: str | None = None, test: str | None = None
) -> tuple[DenseSet, DenseSet]:
    """(images to train heads on, images to judge them on), whose labels are metres. Raises ValueError without any."""
    root = Path(source)
    found = sorted(root.glob("depth/*/"))
    parts = {path.name: partial(_of_maps, root, root / "images" / path.name, path) for path in found}
    learnt, held = _chosen(source, parts, train, test)
    taught = parts[learnt](most["train"], read=partial(_metres, TAUGHT))
    return taught, parts[held](most["test"], read=partial(_metres, _EIGEN))


def _metres(counting: tuple[slice, slice], path: Path) -> npt.NDArray[np.float32]:
    """(H, W) metres; 0 where they are not known or not within the rows and columns that count of NYU's size."""
    with reading(path, "a depth map"), Image.open(io.BytesIO(read_bytes(path)), formats=("PNG",)) as image:
        if not image.mode.startswith("I"):
            raise ValueError(f"it is a picture of mode {image.mode}: give millimetres as 16-bit grey PNG")
        given = np.asarray(image).astype(np.float32) / np.float32(1000)
        inner = counting if given.shape == NYU else ...
        found = np.zeros_like(given)
        found[inner] = np.where((given >= NEAREST) & (given <= FARTHEST), given, 0)[inner]
        if not found.any():
            raise ValueError(f"it has no depth between {NEAREST:g} and {FARTHEST:g} m")
        return found


def _parts(root: Path) -> Mapping[str, Callable[[int], DenseSet]]:
    """Part of a folder, in the first layout that it has -> what reads at most so many of its images."""
    if found := sorted(root.glob("annotations/instances_*2017.json")):
        return {path.stem.removeprefix("instances_").removesuffix("2017"): partial(_of_coco, path) for path in found}
    if splits := splits_in(root):
        return {split: partial(_of_shards, root, split) for split in splits}
    if (root / "annotations/training").is_dir():
        return {
            part: partial(_of_maps, root, root / "images" / name, root / "annotations" / name, read=_ade)
            for part, name in (("train", "training"), ("val", "validation"))
        }
    if found := sorted(root.glob("ImageSets/Segmentation/*.txt")):
        of_voc = partial(_of_maps, root, root / "JPEGImages", root / "SegmentationClass")
        return {path.stem: partial(of_voc, names=frozenset(read_lines(path))) for path in found}
    if found := sorted(root.glob("labels/*/")):
        return {path.name: partial(_of_maps, root, root / "images" / path.name, path) for path in found}
    raise ValueError(
        f"{root} has no labels of pixels: give a COCO tree, shards, ADE20k, VOC, or images/SPLIT and labels/SPLIT"
    )


def _ade(path: Path) -> Label:
    return read_map(path) - np.uint8(1)  # 0 becomes 255


def every(count: int, most: int) -> list[int]:
    """Every k-th place, so that there are `most` of them or fewer."""
    return list(range(0, count, max(1, -(-count // most))))


def _of_maps(
    root: Path,
    folder: Path,
    labels: Path,
    most: int,
    read: Callable[[Path], npt.NDArray[Any]] = read_map,
    names: Collection[str] | None = None,
) -> DenseSet:
    """Images beside maps that are called as they are; `names` are those of the files, if not all count."""
    files = [path for path in image_files(folder) if names is None or path.stem in names]
    if not files:
        raise ValueError(f"{folder} has no images ({', '.join(SUFFIXES)}): it should hold those of {labels}")
    kept = [files[number] for number in every(len(files), most)]
    maps = [labels / f"{path.stem}.png" for path in kept]
    images = from_files(kept, root)

    def label(place: int) -> npt.NDArray[Any]:
        numbers, frame = read(maps[place]), image_frame(kept[place])
        if numbers.shape != (frame.height, frame.width):
            raise ValueError(f"{kept[place]} has other pixels than its label map {maps[place]}: give maps of its size")
        return numbers

    stamped = digest((images.fingerprint, from_files(maps, root).fingerprint))
    return DenseSet(replace(images, stretched=True, fingerprint=stamped), label)


def _of_coco(path: Path, most: int) -> DenseSet:
    source = read_coco(path, None)
    kept = [source.images[place] for place in every(len(source.images), most)]
    folder = path.parents[1] / path.stem.removeprefix("instances_")
    images = from_files([folder / image.file_name for image in kept], folder)
    return _of_outlines(images, [image.label() for image in kept], source.categories)


def _of_shards(root: Path, split: str, most: int) -> DenseSet:
    manifest = Manifest.load(root, split)
    reader = ShardReader(manifest)
    places = every(len(reader), most)

    def read(number: int) -> Image.Image:
        data, _ = reader.read(places[number], "images")
        return open_image(data or b"", reader.describe(places[number]), upright=False)

    images = ImageSet([f"{split} {manifest.index[place]['image_id']}" for place in places], read, manifest.fingerprint)
    labels = [reader.read(place, "labels")[1] or b"" for place in places]
    return _of_outlines(images, labels, manifest.categories, [] if "maps" in manifest.labels else [""])


def _of_outlines(
    images: ImageSet, labels: Sequence[bytes], categories: Sequence[Category], empty: Sequence[str] = ("",)
) -> DenseSet:
    """Images with their labels as shards have them; `empty` is the name of what no object covers, if any."""
    if len(categories) + len(empty) > VOID:
        raise ValueError(f"{images.names[0]} has {len(categories)} categories; at most {VOID - 1} are allowed")
    ordered = sorted(categories, key=lambda category: category.coco_id)
    numbers = {category.coco_id: number for number, category in enumerate(ordered, len(empty))}
    sizes: list[tuple[int, int]] = []
    things: list[list[Thing]] = []  # of each image, the largest first
    for owner, image in enumerate(map(orjson.loads, labels)):
        sizes.append((image["height"], image["width"]))
        own: list[Thing] = []
        for one in image["annotations"]:
            shape = one.get("segmentation") or [one["bbox"]]
            code = shape if isinstance(shape, Mapping) else coco_mask.merge(coco_mask.frPyObjects(shape, *sizes[-1]))
            own.append(Thing(owner, VOID if one["iscrowd"] else numbers[one["category_id"]], code))
        things.append(sorted(own, key=lambda thing: -int(coco_mask.area(thing.code))))

    def label(place: int) -> Label:
        drawn = np.full(sizes[place], 0 if empty else VOID, dtype=np.uint8)
        for thing in things[place]:
            drawn[coco_mask.decode(thing.code) == 1] = thing.label
        return drawn

    stamped = replace(images, stretched=True, fingerprint=digest((images.fingerprint, *labels)))
    large = [
        thing
        for size, own in zip(sizes, things, strict=True)
        for thing in own
        if thing.label != VOID and coco_mask.area(thing.code) >= _SMALLEST * size[0] * size[1]
    ]
    return DenseSet(stamped, label, (*empty, *(category.name for category in ordered)), tuple(large))
