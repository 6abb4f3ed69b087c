"""Images with a class for each pixel, and where there are such, the outlines of their objects; or with the
depth of each pixel.

| layout | found by | no class |
|---|---|---|
| shards of ours | a manifest of the split | crowds |
| ADE20k | `images/{training,validation}`, `annotations/{training,validation}` | 0; class n is number n + 1 |
| Pascal VOC | `JPEGImages`, `SegmentationClass[Aug]`, `ImageSets/Segmentation/*.txt` | 255 |
| any | `images/<split>`, `labels/<split>` with PNG files, `classes.txt` (if it exists) | 255 |
| what `visft shards` reads: COCO, Roboflow, YOLO, Cityscapes | as there | crowds |

Label maps are PNG files of class numbers (indexed or grey), called as their images. With `classes.txt` they
are read as `visft shards` does: a number without a name is an error, and another number than 255 may mean no
class. Labels keep their size; images are stretched to squares. Of objects, each lies on top of the larger
ones; what no object covers is class 0, in shards of label maps without a class. Where an object has a box and
no mask, nobody knows what is in the box: it has no class.

Depth: `images/<split>` and `depth/<split>`, 16-bit PNG files called as the images, of millimetres or what
`depth/unit.txt` says; 0 is not known.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
from faster_coco_eval import mask as coco_mask  # pycocotools' own warns under NumPy 2
from PIL import Image
from torch import Tensor

from visft_ds.data.dataset import labels_of_split
from visft_ds.data.decode import stored_pixels
from visft_ds.data.depth import in_metres, read_numbers, read_unit
from visft_ds.data.shards import Category, Manifest, ShardReader, splits_in
from visft_ds.evals.judge.benchmark import ImageSet, Label
from visft_ds.evals.judge.images import (
    PARTS,
    SUFFIXES,
    chosen,
    digest,
    every,
    from_files,
    image_files,
    read_lines,
    shares,
)
from visft_ds.evals.judge.kinds import Request
from visft_ds.files import checked_name, image_frame, open_image, read_bytes, reading
from visft_ds.monitor.console import gauge
from visft_ds.shards.coco import name_as_here, read_coco
from visft_ds.shards.common import CLASSES, FolderSplit
from visft_ds.shards.layouts import recognise
from visft_ds.shards.maps import OWN, classes_of_maps, read_map
from visft_ds.tasks.classes import VOID

NOTHING = 65_535  #: number of a pixel of outlines that has no class; of label maps it is 255
_SMALLEST = 1 / 3136  # of an image, below which nobody could recognise an object
#: VOC's training images with those of Hariharan et al., from which published numbers learn.
_AUGMENTED = "trainaug"
_ELLIPSES = "mask drawn as an ellipse into its box"  # as visft shards says it of its shards

Map = npt.NDArray[Any]  #: (H, W), classes or metres
ReadMap = Callable[[Path], Map]


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
    label: Callable[[int], Map]  #: of an image; in metres where depth is asked
    classes: tuple[str, ...] = ()  #: their names; "": no object is there
    #: Objects that are large enough and no crowds, in the order of their images.
    things: tuple[Thing, ...] = ()
    notes: tuple[str, ...] = ()  #: what is odd about their masks

    def subset(self, numbers: Sequence[int]) -> DenseSet:
        """Some of the images, without their objects."""
        images = chosen(self.images, numbers)
        return DenseSet(images, lambda number: self.label(numbers[number]), self.classes)


#: Name of a split -> what reads at most so many of its images.
Splits = Mapping[str, Callable[[int], DenseSet]]


def read_train_and_test(request: Request) -> list[DenseSet]:
    """[images to train probes on, images to judge them on], in any layout of the table above.

    Raises:
        ValueError: no such folder or layout, a split that is not there or is not labelled, other categories
            in both, objects of which none has a mask; label maps with a number that `classes.txt` does not
            name.
    """
    source = request.source
    splits = []
    largest = 0  # number of a class
    for name, split in _two_splits(_splits(Path(source), request.void), request).items():
        masked = _masked(split, f"{source}: {name}", source)
        numbers = _numbers_in(masked, f"labels of {name}")
        if len(numbers) < 2:
            raise ValueError(f"{source}: {name} has labels of one class only; a probe needs two")
        largest = max(largest, *numbers)
        splits.append(masked)
    if splits[0].classes:
        return splits
    classes = tuple(map(str, range(largest + 1)))  # label maps do not name them
    return [replace(split, classes=classes) for split in splits]


def read_objects(request: Request) -> list[DenseSet]:
    """As `read_train_and_test`, for objects whose boxes are enough."""
    return list(_two_splits(_splits(Path(request.source)), request).values())


def read_depth(request: Request) -> list[DenseSet]:
    """[images to train heads on, images to judge them on], whose labels are metres. Raises ValueError without
    any.
    """
    unit = read_unit(Path(request.source, "depth"))
    if unit is None:
        raise ValueError(f"{request.source}: its depth maps are relative, and RMSE needs metres: give others")
    splits = _beside(Path(request.source), "depth", partial(_metres, unit))
    return list(_two_splits(splits, request).values())


def _two_splits(splits: Splits, request: Request) -> dict[str, DenseSet]:
    """The split to train on and the one to judge on, by their names: the given ones or the usual ones."""
    train = request.train or (_AUGMENTED if _AUGMENTED in splits else "train")
    test = request.split or next((name for name in PARTS if name in splits), "val")
    if train == test or train not in splits or test not in splits:
        raise ValueError(
            f"{request.source}: probes cannot learn from {train} and be judged on {test}: name two splits; "
            f"it has {', '.join(splits) or 'no splits'}"
        )
    most = request.protocol.images
    learnt, held_out = request.with_groups(splits[train](most["train"]), splits[test](most["test"]))
    if learnt.classes != held_out.classes:
        lone = sorted(set(learnt.classes) ^ set(held_out.classes))
        raise ValueError(
            f"{request.source}: {train} and {test} differ in their categories or the order of these: "
            f"{', '.join(lone[:5])}"
        )
    return {train: learnt, test: held_out}


def _masked(split: DenseSet, name: str, source: str) -> DenseSet:
    """A split without its objects that have no mask. Raises ValueError if it has no others."""
    drawn = tuple(thing for thing in split.things if not thing.boxed)
    boxed = len(split.things) - len(drawn)
    if not boxed:
        return split
    if not drawn:
        raise ValueError(
            f"{name} has boxes and no masks, so no mIoU can be judged: give --on objects={source}"
        )
    note = (
        f"{name}: {boxed} of {len(split.things)} objects have a box and no mask; pixels in these boxes count "
        "nowhere."
    )
    return replace(split, things=drawn, notes=(*split.notes, note))


def _numbers_in(split: DenseSet, what: str) -> set[int]:
    """The numbers of the classes that the labels of a split hold."""
    numbers: set[int] = set()
    images = range(len(split.images))
    for number in gauge(what, len(images), "images", images):
        label = split.label(number)
        numbers.update(np.unique(label).tolist())
        numbers.discard(np.iinfo(label.dtype).max)
    return numbers


def _splits(root: Path, void: str | None = None) -> Splits:
    """The splits of a folder, in the first layout that it has."""
    if void is not None:
        if not void.isdecimal():
            raise ValueError(f"{root}: void={void} is not a number from 0 to 255")
        if not (root / CLASSES).is_file():
            raise ValueError(
                f"{root}: void={void} is for label maps with {CLASSES}, which names their classes"
            )
    of_shards = splits_in(root)
    if of_shards:
        return {split: partial(_of_shards, root, split) for split in of_shards}
    if (root / "annotations/training").is_dir():
        splits = _beside(root, "annotations", lambda path: read_map(path) - np.uint8(1))  # 0 becomes 255
        names = {"training": "train", "validation": "val"}
        return {names.get(name, name): split for name, split in splits.items()}
    if any(root.glob("ImageSets/Segmentation/*.txt")):
        return _voc(root)
    if any(root.glob("labels/*/*.png")):
        return _named(root, void) if (root / CLASSES).is_file() else _beside(root, "labels", read_map)
    try:
        folder_splits = recognise(root)[1]
    except ValueError as error:
        layouts = "give shards, ADE20k, VOC, images/SPLIT and labels/SPLIT, or what visft shards reads"
        raise ValueError(f"{root} has no pixel labels: {layouts}: {error}") from error
    return {
        split.name: partial(_of_folder, split)
        for split in folder_splits
        if split.instances is not None or split.maps is not None
    }


def _beside(
    root: Path, kind: str, read: ReadMap, classes: tuple[str, ...] = (), how: Sequence[str] = ()
) -> Splits:
    """The splits that have a folder of images and one of maps of a kind.

    Args:
        how: maps are read, in so far as it does not follow from their files.
    """
    splits = {}
    for maps in sorted(root.glob(f"{kind}/*/")):
        images = root / "images" / maps.name
        if images.is_dir():
            splits[maps.name] = partial(
                _of_maps, root, image_files(images), maps, read, classes=classes, how=how
            )
    return splits


def _voc(root: Path) -> Splits:
    """The splits that Pascal VOC lists; training images have more maps if they were augmented."""
    augmented = root / "SegmentationClassAug"
    splits = {}
    for path in sorted(root.glob("ImageSets/Segmentation/*.txt")):
        if path.stem == _AUGMENTED and not augmented.is_dir():
            continue
        names = sorted(checked_name(f"{name}.jpg", path) for name in read_lines(path))
        maps = root / "SegmentationClass"
        if path.stem.startswith("train") and augmented.is_dir():
            maps = augmented
        files = [root / "JPEGImages" / name for name in names]
        splits[path.stem] = partial(_of_maps, root, files, maps, read_map)
    return splits


def _named(root: Path, void: str | None) -> Splits:
    """The splits of label maps whose classes are named; classes are numbered from 0 in the order of their
    numbers.
    """
    map_classes = classes_of_maps(OWN, root, None if void is None else int(void))
    numbers_of_classes = sorted(map_classes.names)
    class_of_number = np.full(VOID + 1, VOID, dtype=np.uint8)
    class_of_number[numbers_of_classes] = np.arange(len(numbers_of_classes))

    def read(path: Path) -> Label:
        numbers = read_map(path)
        map_classes.numbers_in(numbers, path)
        label: Label = class_of_number[numbers]
        return label

    classes = tuple(map_classes.names[number] for number in numbers_of_classes)
    return _beside(root, "labels", read, classes, how=[str(number) for number in sorted(map_classes.voids)])


def _metres(unit: float, path: Path) -> npt.NDArray[np.float32]:
    with reading(path, "a depth map"):
        return in_metres(read_numbers(read_bytes(path)), unit)


def _of_maps(
    root: Path,
    files: Sequence[Path],
    folder: Path,
    read: ReadMap,
    most: int,
    classes: tuple[str, ...] = (),
    how: Sequence[str] = (),
) -> DenseSet:
    """Images beside a folder of maps that are called as they are."""
    if not files:
        raise ValueError(f"there are no images ({', '.join(SUFFIXES)}) of the maps in {folder}")
    files = [files[number] for number in every(len(files), most)]
    maps = [folder / f"{path.stem}.png" for path in files]
    images = from_files(files, root)

    def label(number: int) -> Map:
        values = read(maps[number])
        frame = image_frame(files[number])
        if values.shape != (frame.height, frame.width):
            raise ValueError(
                f"{files[number]} has other pixels than its label map {maps[number]}: give maps of its size"
            )
        return values

    fingerprint = digest((images.fingerprint, from_files(maps, root).fingerprint, *how))
    return DenseSet(replace(images, stretched=True, fingerprint=fingerprint), label, classes)


def _of_folder(split: FolderSplit, most: int) -> DenseSet:
    """A split of a data set that `visft shards` reads."""
    source = read_coco(replace(split, captions=None, depth=None, panoptic=None))
    name_as_here(source, split.images)
    entries = [source.images[number] for number in every(len(source.images), most)]
    images = from_files([split.images / entry.file_name for entry in entries], split.images)
    labels = [orjson.loads(entry.label()) for entry in entries]
    return _of_outlines(images, labels, source.categories, is_map=split.instances is None)


def _of_shards(root: Path, split: str, most: int) -> DenseSet:
    manifest = Manifest.load(root, split)
    bands = manifest.bands
    reader = ShardReader(manifest)
    samples = every(len(reader), most)

    def stored_image(number: int) -> bytes:
        return reader.read(samples[number], "images")[0] or b""

    def read(number: int) -> Image.Image:
        return open_image(stored_image(number), reader.describe(samples[number]), upright=False)

    def read_bands(number: int) -> Tensor:
        assert bands is not None
        return shares(stored_pixels(stored_image(number), bands), bands)

    labels = list(labels_of_split(reader, samples))
    rows = manifest.index[samples]
    stored = list(zip(rows["image_size"].tolist(), rows["image_crc32"].tolist(), strict=True))
    names = [label["file_name"] for label in labels]
    of_bands = None if bands is None else read_bands
    images = ImageSet(names, read, manifest.fingerprint, stored=stored, bands=bands, read_bands=of_bands)
    data = _of_outlines(images, labels, manifest.categories, is_map="maps" in manifest.labels)
    if _ELLIPSES in manifest.findings:
        count = manifest.findings[_ELLIPSES][0]
        note = f"{root} {split}: {count} masks were drawn as ellipses into boxes."
        return replace(data, notes=(note,))
    return data


def _of_outlines(
    images: ImageSet,
    labels: Sequence[Mapping[str, Any]],
    categories: Sequence[Category],
    *,
    is_map: bool = False,
) -> DenseSet:
    """Images with their labels as shards have them.

    Args:
        is_map: they were label maps, whose pixels have a class or none; otherwise what no object covers is
            class 0, called "".
    """
    in_order = sorted(categories, key=lambda category: category.coco_id)
    names = [category.name for category in in_order]
    if not is_map:
        names.insert(0, "")
    assert len(names) <= NOTHING, "of more categories, one would have the number of a pixel without any"
    first = len(names) - len(in_order)
    class_of_category = {category.coco_id: number for number, category in enumerate(in_order, first)}

    sizes: list[tuple[int, int]] = []  # (height, width)
    things: list[list[Thing]] = []  # of each image, the largest first
    large: list[Thing] = []
    for owner, entry in enumerate(labels):
        size = entry["height"], entry["width"]
        own = [_thing(owner, annotation, size, class_of_category) for annotation in entry["annotations"]]
        own.sort(key=lambda thing: -_area(thing))
        least = _SMALLEST * size[0] * size[1]
        large += [thing for thing in own if thing.label != NOTHING and _area(thing) >= least]
        sizes.append(size)
        things.append(own)

    # Each block and number of each model asks for all labels again, and drawing one takes several times as
    # long as unpacking it.
    @lru_cache(maxsize=4_096)
    def packed(number: int) -> bytes:
        drawn = np.full(sizes[number], NOTHING if is_map else 0, dtype=np.uint16)
        for thing in things[number]:
            drawn[coco_mask.decode(thing.code) == 1] = NOTHING if thing.boxed else thing.label
        return zlib.compress(drawn.tobytes(), level=1)

    def label(number: int) -> Label:
        return np.frombuffer(zlib.decompress(packed(number)), np.uint16).reshape(sizes[number])

    fingerprint = digest((images.fingerprint, *map(orjson.dumps, labels)))
    return DenseSet(
        replace(images, stretched=True, fingerprint=fingerprint), label, tuple(names), tuple(large)
    )


def _thing(
    owner: int, annotation: Mapping[str, Any], size: tuple[int, int], class_of_category: Mapping[int, int]
) -> Thing:
    """An object by its annotation, in an image of a size (height, width)."""
    mask = annotation.get("segmentation")
    code = mask or [annotation["bbox"]]
    if not isinstance(code, Mapping):
        code = coco_mask.merge(coco_mask.frPyObjects(code, *size))
    label = NOTHING if annotation["iscrowd"] else class_of_category[annotation["category_id"]]
    return Thing(owner, label, code, boxed=not mask)


def _area(thing: Thing) -> int:
    return int(coco_mask.area(thing.code))
