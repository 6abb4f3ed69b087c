"""Images with a class for each pixel, and where there are such, the outlines of their objects.

| layout | found by | no class |
|---|---|---|
| shards of ours | a manifest of the split | crowds |
| ADE20k | `images/{training,validation}`, `annotations/{training,validation}` | 0; class n is number n + 1 |
| Pascal VOC | `JPEGImages`, `SegmentationClass[Aug]`, `ImageSets/Segmentation/{train,trainaug,val}.txt` | 255
|
| any | `images/<split>`, `labels/<split>` with PNG files; `classes.txt` names the classes, if it exists | 255
|
| what `visft shards` reads: COCO, Roboflow, YOLO, Cityscapes | as there | crowds |

Label maps are PNG files of class numbers (indexed or grey), called as their images. With `classes.txt` they
are read as `visft shards` does: a number without a name is an error, and another number than 255 may mean no
class. Labels keep their size; images are stretched to squares. Of objects, each lies on top of the larger
ones; what no object covers is class 0, in shards of label maps without a class. Where an object has a box and
no mask, nobody knows what is in the
box: it has no class.

Depth: `images/<split>` and `depth/<split>`, 16-bit PNG files of millimetres, called as the images; 0 is not
known.
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
import orjson
from faster_coco_eval import mask as coco_mask  # pycocotools' own warns under NumPy 2
from PIL import Image

from visft_ds.data.dataset import labels_of_split
from visft_ds.data.shards import Category, Manifest, ShardReader, splits_in
from visft_ds.evals.judge.benchmark import ImageSet, Label
from visft_ds.evals.judge.images import PARTS, SUFFIXES, chosen, digest, from_files, image_files, read_lines
from visft_ds.files import checked_name, image_frame, open_image, read_bytes, reading
from visft_ds.monitor.console import gauge
from visft_ds.shards.coco import read_coco
from visft_ds.shards.common import FolderSplit
from visft_ds.shards.layouts import recognise
from visft_ds.shards.maps import CLASSES, OWN, classes_of_maps, read_map
from visft_ds.tasks.classes import VOID

NOTHING = 65_535  #: number of a pixel of outlines that has no class; of label maps it is 255
_SMALLEST = 1 / 3136  # of an image, below which nobody could recognise an object
_AUGMENTED = (
    "trainaug"  # VOC's training images with those of Hariharan et al., from which published numbers learn
)
_ELLIPSES = "mask drawn as an ellipse into its box"  # as visft shards says it of its shards


@dataclass(frozen=True)
class Thing:
    """An object of an image."""

    owner: int  #: number of the image
    label: int  #: NOTHING for a crowd
    code: Mapping[str, Any]  #: run-length code of its pixels
    boxed: bool = False  #: which are those of its box, as nobody drew a mask


@dataclass(frozen=True)
class DenseSet:
    """Images, what is where in them, and their objects."""

    images: ImageSet
    label: Callable[[int], npt.NDArray[Any]]  #: of an image; in metres where depth is asked
    classes: tuple[str, ...] = ()  #: their names; "": no object is there
    things: tuple[
        Thing, ...
    ] = ()  #: objects that are large enough and no crowds, in the order of their images
    notes: tuple[str, ...] = ()  #: what is odd about their masks

    def part(self, places: Sequence[int]) -> DenseSet:
        """Some of the images, without their objects."""
        return DenseSet(chosen(self.images, places), lambda number: self.label(places[number]), self.classes)


def read_train_and_test(
    most: Mapping[str, int],
    source: str,
    train: str | None = None,
    test: str | None = None,
    void: int | None = None,
) -> tuple[DenseSet, DenseSet]:
    """(images to train probes on, images to judge them on), in any layout of the table above.

    Args:
        most: images of "train" and "test"; of a larger part every k-th.
        void: number that means no class, for label maps with `classes.txt`.

    Raises:
        ValueError: no such folder or layout, a part that is not there or is not labelled, other categories in
        both,
            objects of which none has a mask; label maps with a number that `classes.txt` does not name.
    """
    found = _pair(_parts(Path(source), void), most, source, train, test)
    for name, part in found.items():
        found[name] = _masked(part, f"{source}: {name}", source)
    largest = 0
    for name, part in found.items():
        seen: set[int] = set()
        for place in gauge(f"labels of {name}", len(part.images), "images", range(len(part.images))):
            label = part.label(place)
            seen |= {*np.unique(label).tolist()} - {np.iinfo(label.dtype).max}
        if len(seen) < 2:
            raise ValueError(f"{source}: {name} has labels of one class only; a probe needs two")
        largest = max(largest, *seen)
    learnt, held = found.values()
    if not learnt.classes:  # label maps do not name them
        numbers = tuple(map(str, range(largest + 1)))
        learnt, held = replace(learnt, classes=numbers), replace(held, classes=numbers)
    _check_classes(found, source)
    return learnt, held


def read_objects(
    most: Mapping[str, int], source: str, train: str | None = None, test: str | None = None
) -> tuple[DenseSet, DenseSet]:
    """As `read_train_and_test`, for objects whose boxes are enough."""
    found = _pair(_parts(Path(source)), most, source, train, test)
    _check_classes(found, source)
    learnt, held = found.values()
    return learnt, held


def _check_classes(parts: Mapping[str, DenseSet], source: str) -> None:
    """Raise ValueError if two parts have other classes, or in another order."""
    learnt, held = (part.classes for part in parts.values())
    if learnt != held:
        lone = sorted(set(learnt) ^ set(held))
        differ = f"differ in their categories or the order of these: {', '.join(lone[:5])}"
        raise ValueError(f"{source}: {' and '.join(parts)} {differ}")


def _masked(part: DenseSet, name: str, source: str) -> DenseSet:
    """A part without its objects that have no mask. Raises ValueError if it has no others."""
    drawn = tuple(thing for thing in part.things if not thing.boxed)
    boxed = len(part.things) - len(drawn)
    if not boxed:
        return part
    if not drawn:
        raise ValueError(
            f"{name} has boxes and no masks, so no mIoU can be judged: give --on objects={source}"
        )
    note = f"{name}: {boxed} of {len(part.things)} objects have a box and no mask; pixels in these boxes count nowhere."
    return replace(part, things=drawn, notes=(*part.notes, note))


def read_depth(
    most: Mapping[str, int], source: str, train: str | None = None, test: str | None = None
) -> tuple[DenseSet, DenseSet]:
    """(images to train heads on, images to judge them on), whose labels are metres. Raises ValueError without
    any.
    """
    learnt, held = _pair(_beside(Path(source), "depth", _metres), most, source, train, test).values()
    return learnt, held


Parts = Mapping[str, Callable[[int], DenseSet]]  #: name of a part -> what reads at most so many of its images


def _pair(
    parts: Parts, most: Mapping[str, int], source: str, train: str | None, test: str | None
) -> dict[str, DenseSet]:
    """The part to train on and the one to judge on by their names: the given ones or the usual ones."""
    usual = _AUGMENTED if _AUGMENTED in parts else "train"
    learnt, held = train or usual, test or next((name for name in PARTS if name in parts), "val")
    if learnt == held or not {learnt, held} <= set(parts):
        has = f"it has {', '.join(parts) or 'no parts'}"
        raise ValueError(
            f"{source}: probes cannot learn from {learnt} and be judged on {held}: name two parts; {has}"
        )
    return {learnt: parts[learnt](most["train"]), held: parts[held](most["test"])}


def _parts(root: Path, void: int | None = None) -> Parts:
    """The parts of a folder, in the first layout that it has."""
    if void is not None and not (root / CLASSES).is_file():
        raise ValueError(f"{root}: void={void} is for label maps with {CLASSES}, which names their classes")
    if splits := splits_in(root):
        return {split: partial(_of_shards, root, split) for split in splits}
    if (root / "annotations/training").is_dir():
        names = {"training": "train", "validation": "val"}
        return {names.get(name, name): part for name, part in _beside(root, "annotations", _ade).items()}
    if found := sorted(root.glob("ImageSets/Segmentation/*.txt")):
        listed = {
            path.stem: sorted(checked_name(f"{name}.jpg", path) for name in read_lines(path))
            for path in found
        }
        augmented = root / "SegmentationClassAug"  # of more training images
        parts = {}
        for part, listing in listed.items():
            maps = (
                augmented if part.startswith("train") and augmented.is_dir() else root / "SegmentationClass"
            )
            parts[part] = partial(
                _of_maps, root, [root / "JPEGImages" / name for name in listing], maps, read_map
            )
        if _AUGMENTED in parts and not augmented.is_dir():
            del parts[_AUGMENTED]
        return parts
    if any(root.glob("labels/*/*.png")) and (root / CLASSES).is_file():
        return _named(root, void)
    if any(root.glob("labels/*/*.png")):
        return _beside(root, "labels", read_map)
    try:
        splits_of_folder = recognise(root)[1]
    except ValueError as error:
        given = "give shards, ADE20k, VOC, images/SPLIT and labels/SPLIT, or what visft shards reads"
        raise ValueError(f"{root} has no pixel labels: {given}: {error}") from error
    labelled = [split for split in splits_of_folder if split.instances is not None or split.maps is not None]
    return {split.name: partial(_of_split, split) for split in labelled}


def _named(root: Path, void: int | None) -> Parts:
    """The parts of label maps whose classes are named; classes are numbered from 0 in the order of their
    numbers.
    """
    map_classes = classes_of_maps(OWN, root, void)
    names = map_classes.names
    places = np.full(VOID + 1, VOID, dtype=np.uint8)
    places[sorted(names)] = np.arange(len(names))

    def read(path: Path) -> Label:
        numbers = read_map(path)
        map_classes.numbers_in(numbers, path)
        placed: Label = places[numbers]
        return placed

    def named(part: Callable[[int], DenseSet], most: int) -> DenseSet:
        data = part(most)
        stamped = digest((data.images.fingerprint, *map(str, sorted(map_classes.voids))))
        classes = tuple(names[number] for number in sorted(names))
        return replace(data, images=replace(data.images, fingerprint=stamped), classes=classes)

    return {name: partial(named, part) for name, part in _beside(root, "labels", read).items()}


def _beside(root: Path, kind: str, read: Callable[[Path], npt.NDArray[Any]]) -> Parts:
    """The parts that have a folder of images and one of maps of a kind."""
    both = [(root / "images" / maps.name, maps) for maps in sorted(root.glob(f"{kind}/*/"))]
    return {
        maps.name: partial(_of_maps, root, image_files(images), maps, read)
        for images, maps in both
        if images.is_dir()
    }


def _ade(path: Path) -> npt.NDArray[np.uint8]:
    return read_map(path) - np.uint8(1)  # 0 becomes 255


def _metres(path: Path) -> npt.NDArray[np.float32]:
    with reading(path, "a depth map"), Image.open(io.BytesIO(read_bytes(path)), formats=("PNG",)) as image:
        if not image.mode.startswith("I"):
            raise ValueError(f"it is a picture of mode {image.mode}: give millimetres as 16-bit grey PNG")
        return np.asarray(image).astype(np.float32) / np.float32(1000)


def every(count: int, most: int) -> list[int]:
    """Every k-th place, so that there are `most` of them or fewer."""
    return list(range(0, count, max(1, -(-count // most))))


def _of_maps(
    root: Path, files: Sequence[Path], labels: Path, read: Callable[[Path], npt.NDArray[Any]], most: int
) -> DenseSet:
    """Images beside a folder of maps that are called as they are."""
    if not files:
        raise ValueError(f"there are no images ({', '.join(SUFFIXES)}) of the maps in {labels}")
    kept = [files[number] for number in every(len(files), most)]
    maps = [labels / f"{path.stem}.png" for path in kept]
    images = from_files(kept, root)

    def label(place: int) -> npt.NDArray[Any]:
        numbers, frame = read(maps[place]), image_frame(kept[place])
        if numbers.shape != (frame.height, frame.width):
            raise ValueError(
                f"{kept[place]} has other pixels than its label map {maps[place]}: give maps of its size"
            )
        return numbers

    stamped = digest((images.fingerprint, from_files(maps, root).fingerprint))
    return DenseSet(replace(images, stretched=True, fingerprint=stamped), label)


def _of_split(split: FolderSplit, most: int) -> DenseSet:
    source = read_coco(split.instances, None, maps=split.maps)
    some = [source.images[place] for place in every(len(source.images), most)]
    images = from_files([split.images / image.file_name for image in some], split.images)
    empty = [] if split.instances is None else [""]  # label maps give every pixel a class, or none
    return _of_outlines(images, [orjson.loads(image.label()) for image in some], source.categories, empty)


def _of_shards(root: Path, split: str, most: int) -> DenseSet:
    manifest = Manifest.load(root, split)
    reader = ShardReader(manifest)
    places = every(len(reader), most)

    def read(number: int) -> Image.Image:
        data, _ = reader.read(places[number], "images")
        return open_image(data or b"", reader.describe(places[number]), upright=False)

    labels = list(labels_of_split(reader, places))
    rows = manifest.index[places]
    stored = list(zip(rows["image_size"].tolist(), rows["image_crc32"].tolist(), strict=True))
    images = ImageSet([label["file_name"] for label in labels], read, manifest.fingerprint, stored=stored)
    part = _of_outlines(images, labels, manifest.categories, [] if "maps" in manifest.labels else [""])
    if _ELLIPSES in manifest.findings:
        note = f"{root} {split}: {manifest.findings[_ELLIPSES][0]} masks were drawn as ellipses into boxes."
        return replace(part, notes=(note,))
    return part


def _of_outlines(
    images: ImageSet,
    labels: Sequence[Mapping[str, Any]],
    categories: Sequence[Category],
    empty: Sequence[str] = ("",),
) -> DenseSet:
    """Images with their labels as shards have them; `empty` is the name of what no object covers, if any."""
    if len(categories) + len(empty) > NOTHING:
        raise ValueError(f"there are {len(categories):,} categories; at most {NOTHING - 1:,} are allowed")
    ordered = sorted(categories, key=lambda category: category.coco_id)
    numbers = {category.coco_id: number for number, category in enumerate(ordered, len(empty))}
    sizes: list[tuple[int, int]] = []
    things: list[list[Thing]] = []  # of each image, the largest first
    large: list[Thing] = []
    for owner, image in enumerate(labels):
        sizes.append((image["height"], image["width"]))
        own: list[Thing] = []
        for one in image["annotations"]:
            mask = one.get("segmentation")
            shape = mask or [one["bbox"]]
            code = (
                shape
                if isinstance(shape, Mapping)
                else coco_mask.merge(coco_mask.frPyObjects(shape, *sizes[-1]))
            )
            own.append(
                Thing(owner, NOTHING if one["iscrowd"] else numbers[one["category_id"]], code, boxed=not mask)
            )
        things.append(sorted(own, key=lambda thing: -int(coco_mask.area(thing.code))))
        least = _SMALLEST * image["height"] * image["width"]
        large += [one for one in things[-1] if one.label != NOTHING and coco_mask.area(one.code) >= least]

    def label(place: int) -> Label:
        drawn = np.full(sizes[place], 0 if empty else NOTHING, dtype=np.uint16)
        for thing in things[place]:
            drawn[coco_mask.decode(thing.code) == 1] = NOTHING if thing.boxed else thing.label
        return drawn

    stamped = replace(
        images, stretched=True, fingerprint=digest((images.fingerprint, *map(orjson.dumps, labels)))
    )
    return DenseSet(stamped, label, (*empty, *(category.name for category in ordered)), tuple(large))
